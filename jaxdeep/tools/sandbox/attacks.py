"""What hostile programs try, each against the box it runs in.

The file runs inside a box, as `python attacks.py NAME...` with settings as JSON on its input, and
is never imported there or here. An attack returns a sentence if it got what it wanted, else None;
each outcome is written to the report channel at once, so that those of a program that is killed
count.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import socket
import stat
import sys
import threading
import time

ATTACKS = {}
MB = 1 << 20


def attack(function):
    ATTACKS[function.__name__] = function
    return function


def succeeds(action, *args):
    try:
        action(*args)
    except (OSError, ValueError):
        return False
    return True


@attack
def fork_bomb(settings):
    children, most = [], settings["processes"]
    try:
        while len(children) <= 2 * most:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return f"{len(children)} processes" if len(children) > most else None


@attack
def thread_bomb(settings):
    release, started = threading.Event(), 0
    threading.stack_size(65536)
    try:
        while started <= 2 * settings["processes"]:
            threading.Thread(target=release.wait, daemon=True).start()
            started += 1
    except RuntimeError:
        pass
    release.set()
    return f"{started} threads" if started > settings["processes"] else None


@attack
def memory(settings):
    held = []
    try:
        while len(held) <= 2 * settings["memory_mb"]:
            held.append(bytearray(MB))
    except MemoryError:
        return None
    return f"{len(held)} MB"


@attack
def memory_of_many(settings):
    for _ in range(12):
        if os.fork() == 0:
            held = bytearray(settings["memory_mb"] * MB // 4)
            held[::4096] = b"x" * len(held[::4096])
            time.sleep(60)
    time.sleep(60)
    return "12 processes with three times the memory"


@attack
def endless_loop(settings):
    while True:
        pass


@attack
def ignored_signals(settings):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    if os.fork() == 0:
        os.setsid()
    while True:
        time.sleep(1)


@attack
def output_flood(settings):
    while True:
        os.write(1, b"x" * 65536)


@attack
def report_flood(settings):
    while True:
        os.write(int(os.environ["REPORT_FD"]), b"x" * 65536)


@attack
def many_files(settings):
    for n in range(40_000):
        with open(f"file{n}", "w") as file:
            file.write("x")


@attack
def raised_limits(settings):
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    kinds = ("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_CPU", "RLIMIT_FSIZE")
    raised = [k for k in kinds if succeeds(resource.setrlimit, getattr(resource, k), infinite)]
    return f"raised {raised}" if raised else None


@attack
def become_root(settings):
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        if re.search(r"^CapEff:\s*0*[1-9a-f]", file.read(), re.MULTILINE):
            return "it has privileges"
    if os.getuid() == 0:
        return None  # without a privilege that is only a name
    return "became root" if succeeds(os.setuid, 0) or succeeds(os.setgid, 0) else None


@attack
def make_device(settings):
    made = succeeds(os.mknod, "device", stat.S_IFBLK | 0o600, os.makedev(8, 0))
    return "made a block device" if made else None


@attack
def daemon(settings):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(
                sys.executable,
                [sys.executable, "-c", "import time; time.sleep(60)", settings["marker"]],
            )
        os._exit(0)
    time.sleep(0.05)  # whether it outlives the run is seen outside


@attack
def write_outside(settings):
    places = [settings["outside"], "/usr/x", "/etc/x", "/var/tmp/x", "/root/x", "/x", "/dev/x"]
    written = [place for place in places if succeeds(lambda p: open(p, "w").close(), place)]
    return f"wrote {written}" if written else None


@attack
def read_host(settings):
    places = (settings["secret"], "/etc/shadow", "/etc/passwd", "/etc/hostname")
    found = [place for place in places if succeeds(lambda p: open(p).close(), place)]
    found += [place for place in ("/home", "/var") if succeeds(os.listdir, place)]
    return f"read {found}" if found else None


@attack
def symlink_out(settings):
    os.symlink(settings["secret"], "link")
    return "read through a link" if succeeds(lambda: open("link").close()) else None


@attack
def variables(settings):
    names = [name for name in os.environ if name == settings["variable"]]
    for pid in os.listdir("/proc") if succeeds(os.listdir, "/proc") else []:
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if settings["variable"].encode() in file.read():
                    names.append(f"of process {pid}")
        except OSError:
            continue
    return f"read {names}" if names else None


def connects(family, kind, address):
    try:
        with socket.socket(family, kind) as client:
            client.settimeout(1)
            client.connect(address)
    except OSError:
        return False
    return True


@attack
def tcp(settings):
    address = ("127.0.0.1", settings["tcp"])
    return "connected" if connects(socket.AF_INET, socket.SOCK_STREAM, address) else None


@attack
def udp(settings):
    def send():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"x", ("127.0.0.1", settings["udp"]))

    succeeds(send)  # whether it arrives is seen outside


@attack
def local_sockets(settings):
    names = ("\0" + settings["abstract"], settings["socket"])
    made = [n for n in names if connects(socket.AF_UNIX, socket.SOCK_STREAM, n)]
    return f"connected to {made}" if made else None


@attack
def other_sockets(settings):
    families = {"vsock": 40, "kernel cryptography": 38, "packets": 17}
    made = [
        n
        for n, f in families.items()
        if succeeds(lambda f: socket.socket(f, 3 if f == 17 else 1), f)
    ]
    return f"made sockets: {made}" if made else None


@attack
def signal_host(settings):
    return "signalled" if succeeds(os.kill, settings["pid"], 0) else None


@attack
def trace_host(settings):
    libc = ctypes.CDLL(None, use_errno=True)
    seize, detach = 0x4206, 17
    if libc.ptrace(seize, settings["pid"], None, None) == 0:
        libc.ptrace(detach, settings["pid"], None, None)
        return "traced"
    return None


@attack
def list_processes(settings):
    seen = succeeds(lambda: open(f"/proc/{settings['pid']}/cmdline").close())
    return "saw a process of the host" if seen else None


@attack
def user_namespace(settings):
    child = os.fork()
    if child == 0:
        os._exit(ctypes.CDLL(None).unshare(0x10000000) == 0)
    return "made one" if os.waitpid(child, 0)[1] else None


def fill(folder, limit_mb):
    written, block = 0, b"x" * MB
    try:
        for n in range(limit_mb * 2 // 4):
            with open(f"{folder}/full{n}", "wb") as file:
                for _ in range(4):
                    file.write(block)
                    file.flush()
                    written += 1
    except OSError:
        pass
    return f"wrote {written} MB to {folder}" if written > limit_mb else None


@attack
def fill_temporary(settings):
    outcomes = [fill(folder, settings["temporary_mb"]) for folder in ("/tmp", "/dev/shm")]
    return next((outcome for outcome in outcomes if outcome), None)


@attack
def fill_work(settings):
    outcome = fill(".", settings["disk_mb"])
    time.sleep(2)  # the watchdog of a folder of the host looks every tenth of a second
    return outcome


def main():
    settings = json.loads(sys.stdin.read())
    report = int(os.environ["REPORT_FD"])
    for name in sys.argv[1:]:
        outcome = ATTACKS[name](settings)
        os.write(report, (json.dumps({name: outcome}) + "\n").encode())


if __name__ == "__main__":
    main()
