"""Hosts on one machine: network, process and mount namespaces, a bridge between them, an sshd in each.

Everything of a host (processes, address, mounts) ends with its first process, and that ends with this one: nothing is
left behind, however the tests end.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

NETWORK = "10.213.77"
SHARED = Path("/mnt")
"""Where every host sees the folder that all of them share; a folder that exists on any machine."""
PROJECT = Path(__file__).parents[2]
HOME = Path.home()

# Ended when this process ends, however it does.
_NAMESPACES = ("setpriv", "--pdeathsig=KILL", "unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc")
_FIRST_PROCESS = ("--kill-child=KILL", "bash", "-c", "echo; exec 1>&-; sleep infinity & wait")


def missing() -> str | None:
    """Why hosts cannot be made here, if they cannot."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    needed = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "ss", "pgrep", "unshare", "nsenter", "setpriv", "hostname")
    absent = [tool for tool in needed if not which(tool)]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: openssh-server openssh-client rsync iproute2 procps)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "probe", "type", "bridge"],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else None


def which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Host:
    """A machine of its own: a name, an address, a home folder and a /tmp, its own processes."""

    def __init__(self, folder: Path, address: str, shared: Path, home: Path) -> None:
        self.folder, self.name, self.address = folder, folder.name, address
        self.home, self.tmp = home, folder / "tmp"
        self.tmp.mkdir(parents=True)
        # The first process only takes over orphans.
        self.process = subprocess.Popen(
            [*_NAMESPACES, *_FIRST_PROCESS],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"\n", "unshare failed"
        (self.pid,) = map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())
        self.run("mount", "--bind", folder.parent / "names", "/etc/hosts")
        own = [(self.home, HOME), (self.tmp, Path("/tmp"))]
        # The Python of these tests stays where it is, also under a folder that the host has of its own.
        pythons = {Path(sys.prefix), Path(sys.base_prefix)}
        binds = [(p, mine / p.relative_to(over)) for p in pythons for mine, over in own if p.is_relative_to(over)]
        binds += [(shared, SHARED), *own]
        for source, target in binds:
            target.mkdir(parents=True, exist_ok=True)
            self.run("mount", "--rbind", source, target)
        self.mounted = {path.name for path in self.tmp.iterdir()}  # these tests' Python, where that is below /tmp
        self.run("mount", "-t", "tmpfs", "tmpfs", "/run")
        self.run("mkdir", "/run/sshd")
        self.run("hostname", self.name)
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *arguments: str | Path) -> list[str]:
        """``arguments``, to be run on this host with a clean environment."""
        environment = [f"HOME={HOME}", f"PATH={os.defpath}:/usr/sbin:/sbin:/usr/local/bin", "TERM=dumb", "LANG=C.UTF-8"]
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", f"--wd={HOME}"]
        return [*enter, "env", "-i", *environment, *map(str, arguments)]

    def run(self, *arguments: str | Path, timeout_s: float = 60) -> str:
        """Run a command on this host; its output. It must succeed."""
        done = self.try_run(*arguments, timeout_s=timeout_s)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}"
        return done.stdout

    def try_run(self, *arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on this host; both outputs in one.

        Through a file: ssh leaves a process behind for ten seconds, for whose end a pipe would wait.
        """
        with tempfile.TemporaryFile("w+") as output:
            command = self.command(*arguments)
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s)
            output.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, output.read())

    def shell(self, line: str, timeout_s: float = 60) -> str:
        """Run a line as ``ray submit`` would: in a shell that has read ~/.bashrc."""
        return self.run("bash", "-c", f"source ~/.bashrc; {line}", timeout_s=timeout_s)

    def end(self) -> None:
        """All processes of the host end, its address and mounts vanish."""
        self.process.kill()
        self.process.wait()


class Hosts:
    """A laptop and some machines on one network.

    Each has a home folder of its own, and only the laptop's key opens the machines; or, ``one_home``, all have the
    same one, as on most clusters with a scheduler, and nobody logs in.
    """

    def __init__(self, folder: Path, machines: int, *, one_home: bool = False) -> None:
        self.folder, self.shared, self.image = folder, folder / "shared", make_image(folder)
        self.one_home = one_home
        self.shared.mkdir()
        addresses = {"localhost": "127.0.0.1"} | {f"machine{i}": f"{NETWORK}.{i}" for i in range(1, machines + 1)}
        addresses["laptop"] = f"{NETWORK}.254"
        (folder / "names").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        self._hosts: list[Host] = []
        try:
            self._make(machines)
        except BaseException:
            self.end()
            raise

    def _make(self, machines: int) -> None:
        self.laptop = self._host("laptop", 254)
        self.laptop.run("ip", "link", "add", "lan", "type", "bridge")
        self.laptop.run("ip", "address", "add", f"{self.laptop.address}/24", "dev", "lan")
        self.laptop.run("ip", "link", "set", "lan", "up")
        self.machines = [self._host(f"machine{i}", i) for i in range(1, machines + 1)]
        for index, machine in enumerate(self.machines, start=1):
            self._plug_in(machine, f"port{index}")
        if not self.one_home:
            self._open_to_the_laptop()

    def _host(self, name: str, number: int) -> Host:
        home = self.image if self.one_home else self.folder / name / "home"
        if not self.one_home:
            shutil.copytree(self.image, home, symlinks=True)
        host = Host(self.folder / name, f"{NETWORK}.{number}", self.shared, home)
        self._hosts.append(host)
        return host

    def _open_to_the_laptop(self) -> None:
        ssh = self.laptop.home / ".ssh"
        ssh.mkdir(mode=0o700)
        self.laptop.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", HOME / ".ssh/id_ed25519")
        for machine in self.machines:
            self._start_sshd(machine, (ssh / "id_ed25519.pub").read_text())

    def _plug_in(self, machine: Host, port: str) -> None:
        self.laptop.run("ip", "link", "add", port, "type", "veth", "peer", "name", "outer")
        # The laptop has a process namespace of its own, so the machine's is named from outside.
        move = ["ip", "link", "set", "outer", "netns", str(machine.pid)]
        subprocess.run(["nsenter", f"--target={self.laptop.pid}", "--net", *move], check=True)
        self.laptop.run("ip", "link", "set", port, "master", "lan", "up")
        machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "outer")
        machine.run("ip", "link", "set", "outer", "up")
        machine.run("ip", "route", "add", "default", "via", self.laptop.address)  # Ray asks it for its own address

    def _start_sshd(self, machine: Host, key: str) -> None:
        (machine.home / "authorized_keys").write_text(key)
        machine.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", HOME / "host_key")
        options = {
            "ListenAddress": machine.address,
            "HostKey": HOME / "host_key",
            "AuthorizedKeysFile": HOME / "authorized_keys",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
            "StrictModes": "no",
            "PidFile": "none",
            "MaxStartups": "100",
        }
        (machine.home / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        machine.run(which("sshd") or "sshd", "-f", HOME / "sshd_config", "-E", HOME / "sshd.log")

    def cut_off(self, machine: Host) -> None:
        """Take the machine's link down: its processes go on, nobody hears of them."""
        self.laptop.run("ip", "link", "set", f"port{self.machines.index(machine) + 1}", "down")

    def end(self) -> None:
        """Nothing is left."""
        for host in self._hosts:
            host.end()


def make_image(folder: Path) -> Path:
    """What a machine's image would bring: Python with the packages of this environment, under a prefix of its own.

    The project itself is not among them: the cluster file installs it.
    """
    image = folder / "image"
    environment = image / "inflora-env"
    venv.create(environment, symlinks=True, with_pip=True)
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(f"{ours}\n")
    for name in ("ray", "mlflow"):
        lines = (Path(sys.prefix) / "bin" / name).read_text().splitlines(keepends=True)
        script = environment / "bin" / name
        script.write_text("".join([f"#!{HOME}/inflora-env/bin/python\n", *lines[1:]]))
        script.chmod(0o755)
    # The hosts reach nobody but each other: what pip needs to build the project lies there.
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(image / "wheels")]
    subprocess.run([*download, "setuptools>=77"], check=True)
    (image / ".bashrc").touch()
    config = image / ".config/pip/pip.conf"
    config.parent.mkdir(parents=True)
    config.write_text(f"[global]\nno-index = true\nfind-links = {HOME}/wheels\n")
    return image


def copy_project(target: Path) -> None:
    """Lay out the project as on the machine of whoever installs it from there."""
    for folder in ("inflora", "sweeps", "cluster"):
        shutil.copytree(PROJECT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / file, target / file)
    # The machines have the packages of this environment, whatever their versions.
    pinned = target / "cluster" / "constraints.txt"
    pinned.write_text(constraints(re.findall(r"^([\w-]+)==", pinned.read_text(), re.MULTILINE)))


def constraints(names: Sequence[str]) -> str:
    """The versions of this environment, which the machines have too."""
    return "".join(f"{name}=={version(name)}\n" for name in names)
