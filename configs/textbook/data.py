"""A textbook as data: its text, worked examples and exercises with their answers.

    python -m jaxdeep data --config=configs/textbook/data.py --config.data.source=book/

    --config.data.source=book/chapter.md          (one file) a file alone
    --config.data.collection=prealgebra           (OpenStax) one book of a bundle of several
    --config.data.edits=fixes.jsonl               corrections by a person, applied and logged

Hardware: any CPU core. Time: 6 s for OpenStax's Prealgebra, 1 to 2 s for the others tried.
Result: the counts in jaxdeep/envs/textbook/README.md.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(data=dict(builder="textbook", source="book/")))
