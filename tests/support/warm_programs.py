"""`layercut` and `python` whose imports are already done: each call is a fork of one process.

Importing torch and transformers takes most of the time of a command on a tiny model. `serve` makes
two programs that hand their arguments, folder, environment and standard streams to a process that
has imported everything; it forks, the child does what the real program would do, and the programs
exit with the child's exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layercut.cli import main

PROGRAM = """\
#!{python} -IS
import json, os, socket, sys
request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [request.encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or 1))
"""
IMPORTED = ("LlamaForCausalLM", "AutoModelForCausalLM", "AutoTokenizer", "PreTrainedTokenizerFast")


@contextmanager
def serve(environment: dict[str, str]) -> Iterator[Path]:
    """The folder of the two programs, which work until the context ends."""
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(name, "socket"))
        listener.bind(address)
        listener.listen()
        for program in ("layercut", "python"):
            path = Path(name, program)
            path.write_text(PROGRAM.format(python=sys.executable, address=address))
            path.chmod(0o755)
        number = listener.fileno()
        command = [sys.executable, __file__, str(number)]
        # Leaving closes the process's standard input, which ends it; so does this one's end.
        with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number], env=environment):
            # Were it open here too, a call would wait for a process that has failed.
            listener.close()
            yield Path(name)


def _import_everything() -> None:
    import transformers

    import layercut

    for module in pkgutil.walk_packages(layercut.__path__, "layercut."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in IMPORTED:
        getattr(transformers, name)
    gc.freeze()


def _answer(connection: socket.socket) -> None:
    message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    child = os.fork()
    if not child:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        code = _run(*json.loads(message))
        sys.stdout.flush()
        sys.stderr.flush()
        # Tearing down all that was imported would take seconds.
        os._exit(code)
    for stream in streams:
        os.close(stream)
    connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def _run(argv: list[str], folder: str, environment: dict[str, str]) -> int:
    """Do what the program would do and return its exit code."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    if Path(argv[0]).name == "layercut":
        return main()
    exec(argv[argv.index("-c") + 1], {"__name__": "__main__"})
    return 0


def _serve_until_end_of_input(listener: socket.socket) -> None:
    while listener in select.select([sys.stdin, listener], [], [])[0]:
        with listener.accept()[0] as connection:
            _answer(connection)


if __name__ == "__main__":
    _import_everything()
    _serve_until_end_of_input(socket.socket(fileno=int(sys.argv[1])))
