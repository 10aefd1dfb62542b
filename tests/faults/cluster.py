"""A cluster of several nodes on loopback; each is a process group, so that killing it simulates a lost machine."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import hooks

# Long enough for a machine beside much other work.
_START_S = 300
_ROOT = Path(__file__).resolve().parents[2]
# With several nodes, Ray takes 127.0.0.1 for another name of the machine's external address.
_HEAD_IP = "127.0.0.2"
_OBJECT_STORE_BYTES = 100 * 2**20


@dataclass
class Node:
    """A node of a cluster.

    Attributes:
        process: `ray start --block`, leader of the group of all its processes.
        ip: address on the loopback network; distinct per node, so that a driver finds the head.
    """

    process: subprocess.Popen[bytes]
    ip: str

    def kill(self) -> None:
        """Kill the node without warning, as a spot machine is taken away."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Cluster:
    """A head, which also works, and further nodes.

    Attributes:
        folder: of sockets, logs and token.
        cpus: per node.
        environment: of drivers and `ray` commands.
        head_ip: address of the head.
        wanted: number of nodes of the whole cluster.
        nodes: running nodes; the first is the head.
    """

    folder: Path
    cpus: int
    environment: dict[str, str]
    head_ip: str
    gcs_port: int
    dashboard_port: int
    wanted: int = 1
    nodes: list[Node] = field(default_factory=list)
    _started: int = 0

    @property
    def address(self) -> str:
        """Value of `--ray-address`."""
        return f"{self.head_ip}:{self.gcs_port}"

    @property
    def job_address(self) -> str:
        """Value of `ray job submit --address`."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_head(self) -> None:
        """Start the head, also after it was killed, and wait until it accepts jobs."""
        self.nodes.insert(0, self._start(
            self.head_ip, "--head", f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={free_port()}",            "--dashboard-host=127.0.0.1",
        ))  # fmt: skip
        self._wait(lambda: self.submit("true").wait() == 0)

    def add_node(self, **variables: str) -> Node:
        """Start a node, with further environment variables, and wait until the head knows it."""
        self._started += 1
        node = self._start(f"127.0.0.{self._started + 2}", f"--address={self.address}", variables=variables)
        self.nodes.append(node)
        self._wait(lambda: node.ip in self._alive())
        return node

    def mend(self) -> None:
        """Undo what a fault left: frozen processes, lost nodes, faults that nobody met."""
        for pid in self.workers(""):
            with suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    os.kill(pid, signal.SIGKILL)
        for laid in self.faults.iterdir():
            laid.unlink()
        while len(self.nodes) < self.wanted:
            self.add_node()

    @property
    def faults(self) -> Path:
        """Folder of the files by which faults in processes begin."""
        return Path(self.environment[hooks.FOLDER])

    def claimed(self, fault: str) -> list[Path]:
        """Return the files, named by pid, of the processes that met a fault."""
        return list(self.faults.glob(f"{fault} by *"))

    @contextmanager
    def occupied(self, node: Node) -> Iterator[None]:
        """Let another program have all CPUs of a node."""
        program = (
            "import sys, ray; ray.init(sys.argv[1], logging_level=40, log_to_driver=False); "
            "where = {'num_cpus': int(sys.argv[3]), 'resources': {'node:' + sys.argv[2]: 0.001}}; "
            "other = ray.remote(**where)(type('Other', (), {})).remote(); "
            "ray.get(other.__ray_ready__.remote()); print('held', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", program, self.address, node.ip, str(self.cpus)]
        holder = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert holder.stdout is not None
        try:
            if b"held" not in holder.stdout.readline():
                raise RuntimeError(f"the CPUs of {node.ip} are not free")
            yield
        finally:
            os.killpg(holder.pid, signal.SIGKILL)
            holder.communicate()

    def restart_alone(self) -> None:
        """Start a new head at the same address, with the CPUs of three nodes but no other node.

        Jobs need this: nodes on one machine unpack the files of a job into the same folder and overwrite each other's.
        """
        for node in list(self.nodes):
            self.lose(node)
        self.cpus, self.wanted = 3, 1
        self.start_head()

    def lose(self, node: Node) -> None:
        """Kill a node."""
        node.kill()
        self.nodes.remove(node)

    def submit(self, *command: str, working_dir: Path | None = None, job: str | None = None) -> subprocess.Popen[str]:
        """Start `ray job submit`."""
        options = [
            *(["--working-dir", str(working_dir)] if working_dir else []),
            *(["--submission-id", job] if job else []),
        ]
        return self._ray("job", "submit", "--address", self.job_address, *options, "--", *command)

    def status(self, job: str) -> str:
        """Return the status of a job from the job server: `SUCCEEDED`, `FAILED`, `STOPPED`, ..."""
        program = (
            "import sys; from ray.job_submission import JobSubmissionClient; "
            "print(JobSubmissionClient(sys.argv[1]).get_job_status(sys.argv[2]).value)"
        )
        command = [sys.executable, "-c", program, self.job_address, job]
        return subprocess.check_output(command, env=self.environment, text=True).strip()

    def stop_job(self, job: str) -> subprocess.Popen[str]:
        """Start `ray job stop`."""
        return self._ray("job", "stop", "--address", self.job_address, job)

    def job_logs(self, job: str) -> subprocess.Popen[str]:
        """Start `ray job logs`."""
        return self._ray("job", "logs", "--address", self.job_address, job)

    def workers(self, kind: str) -> list[int]:
        """Return the processes of actors and tasks of this cluster whose names in Ray contain `kind`."""
        mark = f"RAY_TMPDIR={self.folder}\0".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            # A process may end while it is read.
            with suppress(OSError):
                name = (folder / "cmdline").read_bytes().decode(errors="replace")
                if name.startswith("ray::") and kind in name and mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return sorted(found)

    def node_of(self, pid: int) -> Node | None:
        """Return the node that a process belongs to; None where the process has ended."""
        while pid > 1:
            for node in self.nodes:
                if node.process.pid == pid:
                    return node
            try:
                # The process name before it may contain spaces and brackets.
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                return None
        return None

    def close(self) -> None:
        """Kill the remaining nodes and delete the folder."""
        for node in self.nodes:
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, ip: str, *options: str, variables: Mapping[str, str] | None = None) -> Node:
        ports = [
            f"--{name}={free_port()}"
            for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        ]
        command = [
            "ray", "start", f"--node-ip-address={ip}", f"--num-cpus={self.cpus}", "--num-gpus=0", *ports,
            f"--object-store-memory={_OBJECT_STORE_BYTES}", "--block", *options,
        ]  # fmt: skip
        with open(self.folder / f"{ip}.log", "ab") as log:
            process = subprocess.Popen(
                command,
                env=self.environment | (variables or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Node(process, ip)

    def _ray(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ray", *arguments], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _alive(self) -> set[str]:
        """Return the addresses of the nodes that the head takes for alive."""
        code = "print(*(node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']))"
        program = f"import ray; ray.init({self.address!r}, logging_level=40, log_to_driver=False); {code}"
        out = subprocess.run([sys.executable, "-c", program], env=self.environment, capture_output=True, text=True)
        return set(out.stdout.split()) if out.returncode == 0 else set()

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        end = time.monotonic() + _START_S
        while not is_ready():
            if time.monotonic() > end:
                raise TimeoutError(f"the cluster was not ready after {_START_S} s; logs in {self.folder}")
            time.sleep(0.5)


@contextmanager
def cluster(num_nodes: int, cpus: int = 1) -> Iterator[Cluster]:
    """Run a cluster of `num_nodes` nodes, including the head."""
    # Short, since the paths of Ray's sockets are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="r"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    faults = folder / "faults"
    faults.mkdir()
    path = [str(Path(__file__).parent / "startup"), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Without this switch for clusters of several nodes, Ray listens only on 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": str(int(num_nodes > 1)),
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        hooks.FOLDER: str(faults),
    }
    environment.pop("RAY_ADDRESS", None)
    head_ip = _HEAD_IP if num_nodes > 1 else "127.0.0.1"
    made = Cluster(folder, cpus, environment, head_ip, free_port(), free_port(), num_nodes)
    try:
        made.start_head()
        for _ in range(num_nodes - 1):
            made.add_node()
        yield made
    finally:
        made.close()


def free_port() -> int:
    """Return an unused port of loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
