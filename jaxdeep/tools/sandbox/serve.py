"""Runs inside a box that is kept: one command after the other, told on the input.

A line of input is the JSON of {"id", "command", "seconds", "stdin"}; the answer on the report
channel that of {"id", "status", "code", "output", "seconds"}, with contents in base64. What a
command leaves running is killed when it has ended. Never imported; the standard library of 3.6.
"""

import base64
import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time


def main():
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # orphans become children of this process, and can be waited for
    libc.prctl(4, 0, 0, 0, 0)  # what it runs has its user, and could otherwise open its channels
    settings = json.loads(sys.argv[1])
    report = int(os.environ.pop("REPORT_FD"))
    os.set_inheritable(report, False)

    def answer(**record):
        data = (json.dumps(record) + "\n").encode()
        while data:
            data = data[os.write(report, data) :]

    answer(ready=True)
    for line in iter(sys.stdin.buffer.readline, b""):
        told = json.loads(line.decode())
        answer(id=told["id"], **run(told, settings))


def run(told, settings):
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            told["command"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
    except OSError as error:
        return {"status": "exited", "code": 127, "output": pack(str(error).encode()), "seconds": 0}
    killed, output = watch(process, told, settings, start)
    if killed:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    kill_all(settings["alone"])
    status = killed or ("exited" if code >= 0 else "signal")
    return {
        "status": status,
        "code": None if killed else abs(code),
        "output": pack(output),
        "seconds": time.monotonic() - start,
    }


def watch(process, told, settings, start):
    """Feeds and reads a command until it ends or goes over a limit, which is returned."""
    half, flood = settings["output_bytes"] // 2, settings["flood_bytes"]
    head, tail, total, killed = b"", b"", 0, None
    data = base64.b64decode(told["stdin"])
    selector = selectors.DefaultSelector()
    for pipe in (process.stdin, process.stdout):
        os.set_blocking(pipe.fileno(), False)
    selector.register(process.stdout, selectors.EVENT_READ)
    selector.register(process.stdin, selectors.EVENT_WRITE)
    ended = False
    while True:
        left = start + told["seconds"] - time.monotonic()
        if left <= 0 and not ended:
            killed = "timeout"
            break
        events = selector.select(0 if ended else min(left, 0.02))
        for key, _ in events:
            if key.fileobj is process.stdin:
                try:
                    data = data[os.write(process.stdin.fileno(), data[:65536]) :] if data else data
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    selector.unregister(process.stdin)
                    process.stdin.close()
                continue
            part = process.stdout.read(65536)
            if not part:
                selector.unregister(process.stdout)
                continue
            total += len(part)
            room = max(0, half - len(head))
            head, tail = head + part[:room], (tail + part[room:])[-half:]
        if total > flood:
            killed = "output"
            break
        if ended and not any(key.fileobj is process.stdout for key, _ in events):
            break  # what was written is read; what others hold open is not waited for
        ended = ended or process.poll() is not None
    selector.close()
    left_out = total - len(head) - len(tail)
    note = b"\n... %d bytes left out ...\n" % left_out if left_out else b""
    return killed, head + note + tail


def kill_all(alone):
    """Ends all processes below this one. `alone`: there are no others that it could signal."""
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for pid in [-1] if alone else descendants():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def descendants():
    """The processes below this one, by the table of processes."""
    found, todo = [], [os.getpid()]
    while todo:
        path = f"/proc/{todo.pop()}/task"
        with contextlib.suppress(OSError):
            for thread in os.listdir(path):
                with open(f"{path}/{thread}/children") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                todo += children
    return found


def pack(data):
    return base64.b64encode(data).decode()


if __name__ == "__main__":
    main()
