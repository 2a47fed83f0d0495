"""`python -m jaxdeep VERB`, the same as the `jaxdeep` command."""

from jaxdeep.run.cli import main

raise SystemExit(main())
