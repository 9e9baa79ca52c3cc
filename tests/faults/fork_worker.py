"""Ray's entry to a worker process, `setup_worker.py`, for nodes whose workers a nursery bears. Imports almost nothing."""

import os
import socket
import sys

from nursery import ask

# argv: this file, options of setup_worker.py up to the path of default_worker.py, and its options.
place = next(n for n, word in enumerate(sys.argv) if word.endswith("default_worker.py"))
ours = ("--language=", "--serialized-runtime-env-context=")
argv = [word for word in sys.argv[place:] if not word.startswith(ours)]
with socket.socket(socket.AF_UNIX) as link:
    link.connect(os.environ["FAULTS_NURSERY"])
    ask(link, argv, dict(os.environ), os.getcwd(), [0, 1, 2], driver=False)
