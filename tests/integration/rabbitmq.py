"""A private RabbitMQ broker or cluster on loopback: own folders, node names, ports, cookie; stopped by process group.

Nothing of the machine's own broker is used or touched. Runs as any user, root included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from authority import Authority

START_SECONDS = 90
SCRIPTS = Path("/usr/lib/rabbitmq/bin")


class RabbitMissing(Exception):
    """There is no RabbitMQ here, or it does not start; says why."""


@dataclasses.dataclass
class Rabbit:
    """:ivar folder: everything it writes. :ivar home: where the Erlang cookie is, which nodes of a cluster share."""

    folder: Path
    port: int
    dist_port: int
    epmd_port: int
    node: str
    home: Path
    tls_port: int = 0
    authority: Authority | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def tls_url(self) -> str:
        """Asks for a client certificate of `authority`, which has signed its own."""
        return f"amqps://guest:guest@127.0.0.1:{self.tls_port}/"

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def env(self) -> dict[str, str]:
        folder = self.folder
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_MNESIA_DIR": str(folder / "mnesia" / "node"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "none.config"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none.env"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none -kernel inet_dist_use_interface {127,0,0,1}",
        }

    def start(self) -> None:
        """:raises RabbitMissing: it does not come up; with the end of its output."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        with open(self.folder / "output", "ab") as output:
            self.process = subprocess.Popen(
                [_script("rabbitmq-server")],
                env=self.env(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it speaks AMQP. :raises RabbitMissing: it does not."""
        assert self.process is not None
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RabbitMissing(f"rabbitmq-server did not start: {self._tail()}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, as a power failure would."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        self._signal(signal.SIGTERM)
        self._stop_epmd()

    def ctl(self, *args: str) -> str:
        done = subprocess.run(
            [_script("rabbitmqctl"), "-q", "-n", self.node, *args],
            env=self.env(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    def _signal(self, number: int) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        self.process = None

    def _stop_epmd(self) -> None:
        """The name server on our own port, which the Erlang VM left behind."""
        epmd = shutil.which("epmd")
        if epmd:
            subprocess.run([epmd, "-port", str(self.epmd_port), "-kill"], capture_output=True, timeout=20, check=False)

    def _answers(self) -> bool:
        """Speaks AMQP: a wrong protocol header is answered with the right one."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as sock:
                sock.settimeout(1)
                sock.sendall(b"AMQP\x00\x00\x00\x00")
                return sock.recv(4) == b"AMQP"
        except OSError:
            return False

    def _tail(self) -> str:
        text = (self.folder / "output").read_text(errors="replace")
        return " | ".join(text.strip().splitlines()[-5:])


@contextlib.contextmanager
def private_broker(folder: Path) -> Iterator[Rabbit]:
    """A running broker with its data in `folder`. :raises RabbitMissing: not installed or not startable."""
    _look()
    if shutil.which("openssl") is None:
        raise RabbitMissing("openssl is not installed: it makes the broker's certificate")
    *ports, tls_port = _free_ports(4)
    authority = Authority(folder)
    files = authority.host("broker")
    _lay_out(
        folder,
        f"listeners.ssl.1 = 127.0.0.1:{tls_port}\n"
        f"ssl_options.cacertfile = {files.ca}\n"
        f"ssl_options.certfile = {files.certificate}\n"
        f"ssl_options.keyfile = {files.key}\n"
        "ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n",
    )
    rabbit = Rabbit(folder, *ports, _node(), folder, tls_port, authority)
    try:
        rabbit.start()
        yield rabbit
    finally:
        rabbit.stop()


@contextlib.contextmanager
def private_cluster(folder: Path, size: int = 3) -> Iterator[list[Rabbit]]:
    """Running brokers that are one cluster. :raises RabbitMissing: not installed or not startable."""
    _look()
    cookie = folder / ".erlang.cookie"
    cookie.write_text(uuid.uuid4().hex)
    cookie.chmod(0o400)
    (epmd_port, *ports), names = _free_ports(1 + 2 * size), [_node() for _ in range(size)]
    peers = "".join(f"cluster_formation.classic_config.nodes.{n} = {name}\n" for n, name in enumerate(names, 1))
    nodes = []
    for number, name in enumerate(names):
        place = folder / f"node{number}"
        place.mkdir()
        _lay_out(place, f"cluster_formation.peer_discovery_backend = classic_config\n{peers}")
        nodes.append(Rabbit(place, ports[2 * number], ports[2 * number + 1], epmd_port, name, folder))
    try:
        for node in nodes:
            node.launch()
        for node in nodes:
            node.wait()
        yield nodes
    finally:
        for node in nodes:
            node.stop()


def _node() -> str:
    return f"reeve-{uuid.uuid4().hex[:8]}@localhost"


def _look() -> None:
    if _script("rabbitmq-server") is None:
        raise RabbitMissing("rabbitmq-server is not installed: apt-get install rabbitmq-server")


def _lay_out(folder: Path, more: str) -> None:
    """The folders and the configuration of a node."""
    for name in ("mnesia", "log", "generated"):
        (folder / name).mkdir()
    (folder / "enabled_plugins").write_text("[].\n")
    (folder / "rabbitmq.conf").write_text(
        f"vm_memory_high_watermark.relative = 0.9\ndisk_free_limit.absolute = 1MB\n{more}"
    )


def _script(name: str) -> str | None:
    # The package's wrapper in /usr/sbin changes to the user rabbitmq; the script itself runs as we are.
    direct = SCRIPTS / name
    return str(direct) if direct.exists() else shutil.which(name)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()
