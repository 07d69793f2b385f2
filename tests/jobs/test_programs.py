"""Real programs go to sleep and wake: what they knew, they still know."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import sqlite3
import time
from pathlib import Path

import pytest

from tests.jobs.conftest import Command, Dormouse, eventually, free_port

pytestmark = [pytest.mark.root, pytest.mark.timeout(150)]


def needs(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


def get(port: int, path: str = "/") -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def answers(port: int, path: str = "/") -> str:
    def attempt() -> str | None:
        try:
            return get(port, path)
        except (OSError, http.client.HTTPException):
            return None

    return str(eventually(attempt, f"an answer at port {port}"))


def settled(dormouse: Dormouse, name: str = "job", *options: str) -> str:
    """Captured, as soon as the connections of the test have gone."""
    deadline = time.monotonic() + 20
    while True:
        command = dormouse.start("checkpoint", name, *options, "--json")
        code = command.code(120)
        answer = json.loads(command.out)
        if code == 0:
            return str(answer["id"])
        assert "TCP connection" in answer["error"]["message"] and time.monotonic() < deadline, answer
        time.sleep(0.2)


FAMILY = """
import multiprocessing as mp, os, queue, socket, threading, time
# A tree: worker processes behind pipes, threads, a unix socket pair, a file in memory, an open file with an offset.
def work(connection):
    count = 0
    while True:
        item = connection.recv()
        count += 1
        connection.send((item * 2, count))

def serve(pair):
    while True:
        pair.sendall(pair.recv(100).upper())

if __name__ == "__main__":
    mp.set_start_method("fork")
    ends = []
    for _ in range(3):
        mine, other = mp.Pipe()
        mp.Process(target=work, args=(other,), daemon=True).start()
        ends.append(mine)
    near, far = socket.socketpair()
    threading.Thread(target=serve, args=(far,), daemon=True).start()
    memory = open("/dev/shm/memory", "w+b")
    memory.write(b"m" * 3_000_000)
    memory.flush()
    book = open("book.txt")
    lines = queue.Queue(2)
    threading.Thread(target=lambda: [lines.put(book.readline().strip()) for _ in range(1000)], daemon=True).start()
    turn = 0
    while True:
        turn += 1
        for end in ends:
            end.send(turn)
        results = [end.recv() for end in ends]
        near.sendall(b"hello")
        heard = near.recv(100).decode()
        memory.seek(0)
        size = len(memory.read())
        here = os.path.getsize("/dev/shm/memory")
        print(turn, results == [(2 * turn, turn)] * 3, heard, size, here, lines.get(), flush=True)
        time.sleep(0.05)
"""


TALK = """
import os, socket, time
# Two processes that talk over TCP; one connection has unread bytes, of another the other end has been closed.
listener = socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    end, _ = listener.accept()
    while True:
        end.sendall(end.recv(100).upper())

def pair():
    near = socket.create_connection(listener.getsockname())
    return near, listener.accept()[0]

talk = socket.create_connection(listener.getsockname())
talk.sendall(b"hello")
talk.recv(100)
unread, writer = pair()
writer.sendall(b"x" * 100_000)
half, gone = pair()
gone.sendall(b"bye")
gone.close()
turn = 0
while not os.path.exists("stop"):
    turn += 1
    talk.sendall(b"turn %d" % turn)
    print(talk.recv(100).decode(), flush=True)
    time.sleep(0.02)
writer.close()
total = 0
while data := unread.recv(1 << 16):
    total += len(data)
print(total, half.recv(10), half.recv(10), flush=True)
"""


@pytest.mark.usefixtures("tcp")
def test_connections_within_the_tree_go_on(dormouse: Dormouse, tmp_path: Path) -> None:
    job = dormouse.python(TALK, cwd=tmp_path)
    job.until("TURN 5\n")
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    lines = job.lines()
    assert "only a network of its own can have again" in dormouse.refused(
        "restore", snapshot, "--net", "host", expect=2
    )
    (tmp_path / "stop").touch()
    again = dormouse.start("restore", snapshot)
    assert again.code(60) == 0
    (tmp_path / "stop").unlink()
    third = dormouse.start("restore", snapshot)
    third.until(f"TURN {len(lines) + 3}\n")
    (tmp_path / "stop").touch()
    assert third.code(60) == 0
    for restored in (again, third):
        turns = [*lines, *restored.lines()[:-1]]
        assert turns == [f"TURN {number}" for number in range(1, len(turns) + 1)]
        assert restored.lines()[-1] == "100000 b'bye' b''"


def check_family(lines: list[str]) -> None:
    for number, line in enumerate(lines, 1):
        assert line == f"{number} True HELLO 3000000 3000000 line {number}"


def test_a_tree_of_processes_threads_pipes_sockets_and_files_goes_on(dormouse: Dormouse, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {n}\n" for n in range(1, 2000)))
    job = dormouse.python(FAMILY, cwd=tmp_path)
    job.until("\n10 True")
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    before = len(job.lines())
    assert f"captured as {snapshot}" in job.err.decode()
    assert not Path("/dev/shm/memory").exists()

    again = dormouse.start("restore", snapshot)
    again.until(f"\n{before + 10} True")
    # A restored tree can be captured again, and what has not changed is shared.
    second = dormouse.checkpoint()
    assert again.code() == 0
    third = dormouse.start("restore", second)
    third.until(f"\n{before + len(again.lines()) + 5} True")
    # It was captured anywhere, in the middle of a line perhaps.
    check_family((job.out + again.out + third.out).decode().split("\n")[:-1])


def test_leave_running(dormouse: Dormouse) -> None:
    job = dormouse.python("import time, itertools\nfor n in itertools.count(): print(n); time.sleep(0.02)")
    job.until("\n5\n")
    snapshot = dormouse.checkpoint("job", "--leave-running")
    seen = len(job.lines())
    job.until(f"\n{seen + 10}\n")
    assert job.lines() == [str(n) for n in range(len(job.lines()))]
    again = dormouse.start("restore", snapshot, "--name", "other")
    again.until("\n")
    assert 5 < int(again.lines()[0]) <= seen + 1


WEB = """
import http.server, os, threading
count = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global count
        count += 1
        body = str(count).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
"""


@pytest.mark.usefixtures("tcp")
def test_a_python_web_server_keeps_its_state_and_serves_from_two_replicas(dormouse: Dormouse) -> None:
    port = free_port()
    job = dormouse.python(WEB, options=("--publish", f"{port}:8000"))
    assert answers(port) == "1"
    assert get(port) == "2"
    snapshot = settled(dormouse)
    assert job.code() == 0
    again = dormouse.start("restore", snapshot, "--replicas", "2")
    again.until("published", "err")
    # In turn: each replica counts on from where the one was captured.
    assert [get(port) for _ in range(4)] == ["3", "3", "4", "4"]


@pytest.mark.usefixtures("tcp")
def test_on_the_host_network_a_server_comes_back_at_its_port(dormouse: Dormouse) -> None:
    port = free_port()
    job = dormouse.python(WEB.replace("8000", str(port)), options=("--net", "host"))
    assert answers(port) == "1"
    snapshot = settled(dormouse)
    assert job.code() == 0
    dormouse.start("restore", snapshot)
    assert answers(port) == "2"
    assert "is in use" in dormouse.refused("restore", snapshot)


PREFORK = """
import os, socket, time
listener = socket.create_server(("0.0.0.0", 8000), backlog=50)
for number in range(3):
    if os.fork() == 0:
        served = 0
        while True:
            client, _ = listener.accept()
            served += 1
            client.recv(1000)
            body = f"{os.getpid()} {served}".encode()
            client.sendall(b"HTTP/1.0 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
            client.close()
while True:
    os.wait()
"""


@pytest.mark.usefixtures("tcp")
def test_a_prefork_server(dormouse: Dormouse) -> None:
    port = free_port()
    job = dormouse.python(PREFORK, options=("-p", f"{port}:8000"))
    served: dict[str, int] = {}
    for _ in range(9):
        pid, count = answers(port).split()
        assert int(count) == served.get(pid, 0) + 1
        served[pid] = int(count)
    snapshot = settled(dormouse)
    assert job.code() == 0
    dormouse.start("restore", snapshot).until("published", "err")
    for _ in range(9):
        pid, count = get(port).split()
        assert int(count) == served.get(pid, 0) + 1
        served[pid] = int(count)


@pytest.mark.usefixtures("tcp")
def test_node(dormouse: Dormouse) -> None:
    node = needs("node")
    port = free_port()
    program = (
        "let n = 0; const fs = require('fs');"
        "require('http').createServer((q, r) => fs.readFile('/etc/hostname', () => r.end(String(++n)))).listen(8000);"
        "setInterval(() => {}, 100)"
    )
    # Also where it would use io_uring, which `run` denies.
    job = dormouse.run(node, "-e", program, options=("-p", f"{port}:8000"), env={"UV_USE_IO_URING": "1"})
    assert [answers(port), get(port)] == ["1", "2"]
    snapshot = settled(dormouse)
    assert job.code() == 0
    dormouse.start("restore", snapshot).until("published", "err")
    assert [get(port), get(port)] == ["3", "4"]


JAVA = """
public class Counter {
    static volatile int shared = 0;
    public static void main(String[] arguments) throws Exception {
        new Thread(() -> { while (true) { shared++; try { Thread.sleep(1); } catch (Exception e) { } } }).start();
        int last = 0;
        for (int n = 0; ; n++) {
            String made = "";
            for (int i = 0; i < 100; i++) made += i;
            System.out.println(n + " " + (shared >= last) + " " + made.length());
            last = shared;
            Thread.sleep(50);
        }
    }
}
"""


def test_java(dormouse: Dormouse, tmp_path: Path) -> None:
    java = needs("java")
    needs("javac")
    (tmp_path / "Counter.java").write_text(JAVA)
    job = dormouse.run(java, "-Xmx64m", "Counter.java", cwd=tmp_path)
    job.until("\n5 ")
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    again = dormouse.start("restore", snapshot)
    again.until(f"\n{len(job.lines()) + 5} ")
    assert job.lines() + again.lines() == [f"{n} true 190" for n in range(len(job.lines()) + len(again.lines()))]


def redis(port: int, *words: str) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(" ".join(words).encode() + b"\r\n")
        answer = connection.makefile("rb").readline().decode().strip()
        if answer.startswith("$"):
            answer = connection.makefile("rb").readline().decode().strip()
        return answer


@pytest.mark.usefixtures("tcp")
def test_redis(dormouse: Dormouse, tmp_path: Path) -> None:
    server = needs("redis-server")
    port = free_port()
    options = ("-p", str(port))
    job = dormouse.run(server, "--port", str(port), "--save", "", "--appendonly", "no", options=options, cwd=tmp_path)
    job.until("Ready to accept connections")
    for number in range(50):
        assert redis(port, "SET", f"key{number}", f"value{number}") == "+OK"
    snapshot = settled(dormouse)
    assert job.code() == 0
    dormouse.start("restore", snapshot).until("published", "err")
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    with connection, connection.makefile("rb") as answers_of:
        for number in range(50):
            connection.sendall(b"GET key%d\r\n" % number)
            assert answers_of.readline().startswith(b"$")
            assert answers_of.readline().strip() == b"value%d" % number
        # Somebody is connected now, and that is said.
        assert "is an open TCP connection" in dormouse.refused("checkpoint", "job")
        connection.sendall(b"INCR visits\r\n")
        assert answers_of.readline() == b":1\r\n"
        closed = dormouse.checkpoint("job", "--close-connections")
    dormouse.start("restore", closed).until("published", "err")
    assert redis(port, "INCR", "visits") == ":2"


SQLITE = """
import sqlite3, time
database = sqlite3.connect("data.db", isolation_level=None)
database.execute("PRAGMA journal_mode=WAL")
database.execute("CREATE TABLE IF NOT EXISTS rows (n INTEGER PRIMARY KEY, text TEXT)")
n = 0
while True:
    n += 1
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO rows VALUES (?, ?)", (n, "x" * 500))
    database.execute("COMMIT")
    if n % 100 == 0:
        print(n)
        time.sleep(0.01)
"""


def test_a_database_under_load_stays_whole(dormouse: Dormouse, tmp_path: Path) -> None:
    job = dormouse.python(SQLITE, cwd=tmp_path)
    job.until("\n500\n")
    for _ in range(3):
        snapshot = dormouse.checkpoint()
        assert job.code() == 0
        job = dormouse.start("restore", snapshot)
        job.until("00\n")
    last = int(job.lines()[-1])
    job.until(f"\n{last + 200}\n")
    dormouse.do("stop", "job", "--grace", "5")
    database = sqlite3.connect(tmp_path / "data.db")
    try:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        count, low, high = database.execute("SELECT count(*), min(n), max(n) FROM rows").fetchone()
        assert (count, low) == (high, 1) and high >= last + 200
    finally:
        database.close()


ODDITIES = """
import os, signal, sys, tempfile, time
gone = open("gone.bin", "w+b")
gone.write(b"deleted" * 500_000)
gone.flush()
os.unlink("gone.bin")
stopped = os.fork()
if stopped == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
    print("the child runs again")
    os._exit(4)
os.waitpid(stopped, os.WUNTRACED)
zombie = os.fork()
if zombie == 0:
    os._exit(3)
def state(pid):
    return open(f"/proc/{pid}/stat").read().split()[2]
def look(*_):
    gone.seek(0)
    print("stopped child", state(stopped), "deleted file", len(gone.read()), "zombie", state(zombie))
def finish(*_):
    os.kill(stopped, signal.SIGCONT)
    print("children", os.waitpid(zombie, 0)[1] >> 8, os.waitpid(stopped, 0)[1] >> 8)
    sys.exit(7)
signal.signal(signal.SIGUSR1, look)
signal.signal(signal.SIGUSR2, finish)
time.sleep(0.3)
print("ready")
while True:
    signal.pause()
"""


def test_deleted_files_stopped_children_and_zombies(dormouse: Dormouse, tmp_path: Path) -> None:
    state = "stopped child T deleted file 3500000 zombie Z"
    job = dormouse.python(ODDITIES, cwd=tmp_path)
    job.until("ready")
    job.process.send_signal(10)
    job.until(state)
    dormouse.checkpoint("job", "--leave-running")
    job.out = b""
    job.process.send_signal(10)
    job.until("zombie")
    assert job.lines() == [state]
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    again = dormouse.start("restore", snapshot)
    again.until("runs", "err")
    again.process.send_signal(10)
    again.until("zombie")
    again.process.send_signal(12)
    assert again.code() == 7
    assert again.lines() == [state, "the child runs again", "children 3 4"]


def test_input_that_was_not_yet_read_is_not_lost(dormouse: Dormouse) -> None:
    program = (
        "import sys, time\nprint('ready')\nwhile True:\n  time.sleep(0.01)\n"
        "  if __import__('os').path.exists('/dev/shm/go'): print('read', sys.stdin.readline().strip())\n"
    )
    job: Command = dormouse.python(program)
    job.until("ready")
    job.say("one\ntwo\n")
    time.sleep(1)
    snapshot = dormouse.checkpoint()
    assert job.code() == 0
    again = dormouse.start("restore", snapshot)
    again.until("runs", "err")
    pid = dormouse.do("jobs")[0]["replicas"][0]["pid"]  # type: ignore[index,call-overload]
    again.say("three\n")
    Path(f"/proc/{pid}/root/dev/shm/go").touch()
    again.until("three")
    assert again.lines()[:3] == ["read one", "read two", "read three"]


def test_a_tmpfs_of_its_own_is_kept_and_unseen_outside(dormouse: Dormouse, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    program = (
        "import os, time\nos.makedirs('scratch/deep', mode=0o750); os.symlink('file', 'scratch/deep/link')\n"
        "open('scratch/deep/file', 'w').write('kept'); os.utime('scratch/deep/file', (1, 1))\n"
        "print('ready')\ninput()\n"
        "state = os.stat('scratch/deep/link')\n"
        "print(open('scratch/deep/link').read(), int(state.st_mtime), oct(os.stat('scratch/deep').st_mode))"
    )
    job = dormouse.python(program, options=("--tmpfs", str(scratch)), cwd=tmp_path)
    job.until("ready")
    assert list(scratch.iterdir()) == []
    snapshot = dormouse.checkpoint()
    both = dormouse.start("restore", snapshot)
    both.until("runs", "err")
    both.say("\n")
    assert both.code() == 0
    assert both.lines() == ["kept 1 0o40750"]
    assert list(scratch.iterdir()) == []


def test_io_uring_is_denied_so_that_programs_do_without(dormouse: Dormouse) -> None:
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.syscall(425, 8, ctypes.create_string_buffer(200)), ctypes.get_errno())"
    )
    job = dormouse.python(program)
    assert job.code() == 0
    assert job.lines() == ["-1 38"]
