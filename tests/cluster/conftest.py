"""A cluster of three machines on this one, brought up by the launcher from ``cluster/local.yaml``."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.waiting import until

from .hosts import HOME, Host, Hosts, copy_project, missing

CLUSTER_FILE = "cluster/local.yaml"


class Cluster:
    """The cluster, as whoever sits at the laptop has it."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.laptop = hosts, hosts.laptop
        self.head, *self.workers = hosts.machines
        self.project, self.laptop_ray = HOME / "inflora-sweeps", Path(sys.prefix) / "bin" / "ray"

    def ray(self, *arguments: str, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
        """Type ``ray ...`` in the project's folder on the laptop."""
        return self.laptop.try_run(*self._ray(*arguments), timeout_s=timeout_s)

    def submit(self, recipe: str, *arguments: str, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
        """``ray submit cluster/local.yaml RECIPE -- ARGUMENTS``."""
        return self.ray("submit", CLUSTER_FILE, recipe, "--", *arguments, timeout_s=timeout_s)

    def start_submit(self, log: Path, recipe: str, *arguments: str) -> subprocess.Popen[bytes]:
        """The same, and go on while it runs."""
        command = self.laptop.command(*self._ray("submit", CLUSTER_FILE, recipe, "--", *arguments))
        return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)

    def _ray(self, *arguments: str) -> list[str]:
        return ["bash", "-c", f'cd {self.project}; exec "$@"', "laptop", str(self.laptop_ray), *arguments]

    def lay_out(self) -> None:
        """The project on the laptop, with the addresses filled in."""
        project = self.laptop.home / "inflora-sweeps"
        copy_project(project)
        file = project / CLUSTER_FILE
        config = yaml.safe_load(file.read_text())
        addresses = [machine.address for machine in self.hosts.machines]
        config["provider"] |= {"head_ip": addresses[0], "worker_ips": addresses[1:]}
        config["auth"]["ssh_user"] = "root"
        file.write_text(yaml.safe_dump(config, sort_keys=False))

    def up(self) -> None:
        """Every machine has joined."""
        assert self.ray("get-auth-token", "--generate").returncode == 0
        done = self.ray("up", "--yes", CLUSTER_FILE)
        assert done.returncode == 0, done.stdout
        self.wait_until_joined(len(self.hosts.machines), patience_s=300)

    def wait_until_joined(self, machines: int, patience_s: float) -> None:
        """Until the cluster has so many; Ray's autoscaler believes in a silent one for another while."""
        log = "tail -n 60 /tmp/ray/session_latest/logs/monitor*"
        until(lambda: self.joined() == machines, patience_s, every_s=1, otherwise=lambda: self.head.shell(log))

    def joined(self) -> int:
        """How many machines the cluster has."""
        status = self.head.shell("ray status")
        active = status.partition("Active:")[2].partition("Pending:")[0]
        return sum(int(count) for count in re.findall(r"^ (\d+) ", active, re.MULTILINE))

    def trains(self, machine: Host) -> bool:
        """Whether a trial trains there."""
        return machine.try_run("pgrep", "--full", "ray::.*TrainWorker").returncode == 0


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), machines=3)
    try:
        cluster = Cluster(hosts)
        cluster.lay_out()
        cluster.up()
        yield cluster
    finally:
        hosts.end()
