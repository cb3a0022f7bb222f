"""Slurm on one machine: a controller on the login machine, a daemon on each of the others, one munge for all."""

import re
import subprocess
from pathlib import Path

from tests.waiting import until

from . import hosts
from .hosts import HOME, SHARED, Host, Hosts, copy_project, which

CPUS, GPUS, MEMORY_MB = 4, 2, 6000
"""Of each node, as Slurm is told; the machine has neither so many CPUs nor any GPU."""

ENVIRONMENT = HOME / "inflora-env"

_CONFIG = f"""
ClusterName=lab
SlurmctldHost={{login.name}}({{login.address}})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={SHARED}/munge/socket,cred_expire=5
StateSaveLocation=/tmp/slurmctld
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=10
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
NodeName=DEFAULT CPUs={CPUS} CoresPerSocket={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{GPUS}
{{nodes}}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# The oldest way to hold a job's processes together, which every kernel offers beside whatever else is mounted.
_CGROUPS = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/run/cgroup\n"
_GPUS = f"Name=gpu File=/run/gpu[0-{GPUS - 1}]\n"


def missing() -> str | None:
    """Why Slurm cannot be brought up here, if it cannot."""
    needed = ("slurmctld", "slurmd", "sbatch", "munged")
    if absent := [tool for tool in needed if not which(tool)]:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge)"
    return hosts.missing()


class Slurm:
    """A login machine and nodes, as a user at a university has them: one home, one shared folder, sbatch."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.hosts = Hosts(folder, nodes, one_home=True)
        self.login, self.nodes = self.hosts.laptop, self.hosts.machines
        self.project = SHARED / "inflora-sweeps"
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._install()
            self._configure()
            self._start_munge()
            self._start(self.login, "slurmctld", "-D")
            for node in self.nodes:
                self._prepare(node)
                self._start(node, "slurmd", "-D")
            self._wait_until_ready()
        except BaseException:
            self.end()
            raise

    def _configure(self) -> None:
        nodes = "\n".join(f"NodeName={node.name} NodeAddr={node.address}" for node in self.nodes)
        etc = self.hosts.shared / "slurm"
        etc.mkdir()
        (etc / "slurm.conf").write_text(_CONFIG.format(login=self.login, nodes=nodes))
        (etc / "cgroup.conf").write_text(_CGROUPS)
        (etc / "gres.conf").write_text(_GPUS)

    def _start_munge(self) -> None:
        """Once: a socket in a shared folder is reached from every host."""
        folder = self.hosts.shared / "munge"
        folder.mkdir(mode=0o755)
        (folder / "key-file").write_bytes(b"k" * 128)
        (folder / "key-file").chmod(0o600)
        there = SHARED / "munge"
        files = [f"--{name}={there / name}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
        self._start(self.login, "munged", "--foreground", "--force", *files)

    def _prepare(self, node: Host) -> None:
        """What Slurm finds on a node: files that stand for GPUs, and a cgroup hierarchy of one controller."""
        for index in range(GPUS):
            node.run("mknod", f"/run/gpu{index}", "c", "195", str(index))
        node.run("mkdir", "-p", "/run/cgroup/freezer", "/tmp/slurmd")
        node.run("mount", "-t", "cgroup", "-o", "freezer", "cgroup", "/run/cgroup/freezer")

    def _start(self, host: Host, *command: str) -> None:
        log = (host.folder / f"{command[0]}.log").open("wb")
        slurm = ["env", f"SLURM_CONF={SHARED}/slurm/slurm.conf", *command]
        self._daemons.append(subprocess.Popen(host.command(*slurm), stdout=log, stderr=subprocess.STDOUT))

    def type(self, *command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A command on the login machine, in the project's folder."""
        line = f'export SLURM_CONF={SHARED}/slurm/slurm.conf; cd {self.project}; exec "$@"'
        return self.login.try_run("bash", "-c", line, "login", *command, timeout_s=timeout_s)

    def control(self, *arguments: str) -> None:
        """``scontrol ...``, as the cluster's administrator."""
        done = self.type("scontrol", *arguments)
        assert done.returncode == 0, done.stdout

    def submit(self, place: str, recipe: str, *arguments: str, nodes: int = 2) -> "Job":
        """``sbatch cluster/slurm.sbatch RECIPE -- ARGUMENTS`` with a small part of each node; ``place`` is shared."""
        kept = {"INFLORA_SHARED": SHARED / place, "INFLORA_DATA": SHARED / "data", "INFLORA_ENV": ENVIRONMENT}
        environment = [f"{name}={value}" for name, value in kept.items()] + ["OMP_NUM_THREADS=1"]
        part = (f"--nodes={nodes}", "--cpus-per-task=1", "--gres=gpu:1", "--mem=2500", "--time=60")
        command = ("sbatch", "--parsable", *part, "cluster/slurm.sbatch", recipe, "--", *arguments)
        done = self.type("env", *environment, *command)
        assert done.returncode == 0, done.stdout
        return Job(self, int(done.stdout), place)

    def nodes_of(self, job: "Job") -> list[Host]:
        """The nodes of a job that runs; the first is the one that its script runs on."""
        shown = self.type("squeue", "--noheader", f"--jobs={job.number}", "--format=%N").stdout.strip()
        names = self.type("scontrol", "show", "hostnames", shown).stdout.split()
        return [node for name in names for node in self.nodes if node.name == name]

    def ray(
        self, node: Host, *arguments: str, setting: str = "RAY_AUTH_MODE=token"
    ) -> subprocess.CompletedProcess[str]:
        """``ray ...`` on a node, with the token unless something else is set."""
        return node.try_run("env", "RAY_AUTH_MODE=token", setting, ENVIRONMENT / "bin" / "ray", *arguments)

    def _wait_until_ready(self) -> None:
        states = ("sinfo", "--noheader", "--Node", "--format=%T")
        until(
            lambda: self.type(*states).stdout.split() == ["idle"] * len(self.nodes),
            otherwise=lambda: self.type("sinfo", "--Node", "--long").stdout,
        )

    def _install(self) -> None:
        """As ``cluster/README.md`` says, but that the environment is there and has all but the project."""
        copy_project(self.hosts.shared / self.project.name)
        pip = (f"{ENVIRONMENT}/bin/python", "-m", "pip")
        self.login.run(*pip, "install", "--quiet", f"{self.project}[cluster]", timeout_s=300)
        self.login.run("env", "RAY_AUTH_MODE=token", f"{ENVIRONMENT}/bin/ray", "get-auth-token", "--generate")

    def end(self) -> None:
        """Nothing is left, neither of the hosts nor of their cgroups."""
        self.hosts.end()
        for daemon in self._daemons:
            daemon.wait()
        remove = (
            "mount -t cgroup -o freezer cgroup /mnt && find /mnt -depth -path '/mnt/slurm_machine*' -type d -delete"
        )
        subprocess.run(["unshare", "--mount", "bash", "-c", remove], check=False)


class Job:
    """A job as its user sees it."""

    def __init__(self, slurm: Slurm, number: int, place: str) -> None:
        self.slurm, self.number, self.place = slurm, number, place

    def output(self) -> str:
        """What it has printed so far."""
        file = self.slurm.hosts.shared / self.slurm.project.name / f"slurm-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def address(self) -> str:
        """Of its Ray."""
        (address,) = set(re.findall(r"Ray at (\S+) on", self.output()))
        return str(address)

    def starts(self) -> list[tuple[str, str]]:
        """Which start it was, and on which nodes."""
        return re.findall(r"start (\d+) of job \d+: .* \((.*)\)", self.output())

    def wait_for(self, text: str, patience_s: float = 300) -> None:
        """Until it has printed that; it must not end before."""
        until(lambda: text in self.output() or self._has_ended(), patience_s, otherwise=self.output)
        assert text in self.output(), self.output()

    def ends(self, patience_s: float = 600) -> tuple[str, str]:
        """Its last state and its exit code."""
        until(self._has_ended, patience_s, every_s=0.5, otherwise=self.output)
        facts = self._facts()
        return facts["JobState"], facts["ExitCode"]

    def _has_ended(self) -> bool:
        return self._facts()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def _facts(self) -> dict[str, str]:
        shown = self.slurm.type("scontrol", "show", "job", str(self.number)).stdout
        return dict(re.findall(r"(\w+)=(\S+)", shown))
