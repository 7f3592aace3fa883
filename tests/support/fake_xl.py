"""Stands where ``xl`` would: hands its arguments and its three files to the machine of ``fake_xen.py``.

``fake_xen.py`` puts a line that names its socket, ``MACHINE``, before this text. It imports as little as it can, as the
driver runs ``xl`` for each look.
"""

# ruff: noqa: F821

import _socket
import sys

link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
link.connect(MACHINE)
files = (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + (2).to_bytes(4, "little")
link.sendmsg(["\0".join(sys.argv[1:]).encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, files)])
status = link.recv(1)
sys.exit(status[0] if status else 70)
