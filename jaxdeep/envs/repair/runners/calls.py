"""Runs inside a box: calls functions and sends out what they return, never whether it is right.

The source of `values.py` stands before this one, so that `encode` and `decode` are there. The input
is one line of JSON: a nonce, the calls in the order to make them, each [number, path, function,
arguments]. Records go to the report channel, one a line: the nonce and the JSON of {"call": number}
with "value" or "raised".
"""

import importlib.util
import json
import os
import sys


def main():
    sys.path[:] = [path for path in sys.path if path]
    told = json.loads(sys.stdin.readline())
    nonce, calls = told["nonce"], told["calls"]
    report = os.fdopen(int(os.environ["REPORT_FD"]), "w", encoding="ascii")
    write, flush, dumps = report.write, report.flush, json.dumps

    def record(**entry):
        write(nonce + " " + dumps(entry) + "\n")
        flush()

    root = os.getcwd()
    sys.path.insert(0, root)
    modules = {}
    for number, path, name, arguments in calls:
        try:
            if path not in modules:
                module = path[:-3].replace("/", ".")
                spec = importlib.util.spec_from_file_location(module, os.path.join(root, path))
                modules[path] = sys.modules[module] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[path])
            function = modules[path]
            for part in name.split("."):
                function = getattr(function, part)
            value = encode(function(*map(decode, arguments)))  # noqa: F821
        except BaseException as error:
            record(call=number, raised=type(error).__name__)
        else:
            record(call=number, value=value)
    record(end=len(calls))


if __name__ == "__main__":
    main()
