"""The cluster files, against the schemas of those who read them; a typo fails."""

import copy
import importlib.resources
import json
import os
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from referencing import Registry, Resource

PROJECT = Path(__file__).parents[2]
CLUSTER = PROJECT / "cluster"
LAUNCHER_FILES = ("gpu.yaml", "local.yaml")

KUBERNETES = importlib.resources.files(kubernetes_validate) / "kubernetes-json-schema"


def launcher(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def kuberay():
    return list(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text()))


def check_launcher(config):
    """By Ray's schema, and by what `ray up` checks before it reaches for a machine."""
    schema = importlib.resources.files("ray") / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    validate_config(prepare_config(copy.deepcopy(config)))


def check_ray_job(document):
    """By the schema of KubeRay, and that of Kubernetes for its pods."""
    definitions = json.loads((KUBERNETES / "v1.34.0-local-strict" / "_definitions.json").read_text())
    registry = Registry().with_resource(definitions["$id"], Resource.from_contents(definitions))
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
    jsonschema.Draft202012Validator(schema, registry=registry).validate(document)


def typos(node, path=()) -> Iterator[tuple]:
    """The paths of all keys of mappings whose keys are the schema's, not the user's."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*path, key)
            yield from typos(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from typos(value, (*path, index))


def with_typo(document, path):
    """A copy with the key at ``path`` misspelt."""
    wrong = copy.deepcopy(document)
    parent = wrong
    for step in path[:-1]:
        parent = parent[step]
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return wrong


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_a_launcher_file_is_what_ray_expects(name):
    check_launcher(launcher(name))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_a_misspelt_key_of_a_launcher_file_is_refused(name):
    config = launcher(name)
    for key in config:
        with pytest.raises(jsonschema.ValidationError):
            check_launcher(with_typo(config, (key,)))


def test_what_kubernetes_gets_is_what_it_expects():
    config, job = kuberay()
    volumes = list(yaml.safe_load_all((CLUSTER / "kuberay-volumes.yaml").read_text()))
    kinds = [document["kind"] for document in (config, job, *volumes)]
    assert kinds == ["ConfigMap", "RayJob", "PersistentVolumeClaim", "PersistentVolumeClaim", "Pod"]
    assert len(set(re.findall(r"image: (\S+)", f"{yaml.safe_dump(job)}{yaml.safe_dump(volumes)}"))) == 1
    for document in (config, *volumes):
        kubernetes_validate.validate(document, "1.34", strict=True)
    check_ray_job(job)


def test_with_the_lines_for_kueue_the_ray_job_is_what_kuberay_expects():
    text, lines = re.subn(
        r"^  # (labels|annotations):", r"  \1:", (CLUSTER / "kuberay.yaml").read_text(), flags=re.MULTILINE
    )
    assert lines == 2
    job = list(yaml.safe_load_all(text))[-1]
    check_ray_job(job)
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "user-queue"}
    assert job["spec"]["shutdownAfterJobFinishes"], "Kueue takes no other"


def test_on_kubernetes_what_must_outlast_a_pod_is_on_a_volume():
    """Databases on the head's own, as they would break on one that many pods mount."""
    config, job = kuberay()
    claims = {
        each["metadata"]["name"]: each["spec"]["accessModes"]
        for each in yaml.safe_load_all((CLUSTER / "kuberay-volumes.yaml").read_text())
        if each["kind"] == "PersistentVolumeClaim"
    }
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    claim_of = {each["name"]: each["persistentVolumeClaim"]["claimName"] for each in head["volumes"]}
    mounted = {each["mountPath"]: claims[claim_of[each["name"]]] for each in head["containers"][0]["volumeMounts"]}
    assert mounted[config["data"]["INFLORA_STORAGE"]] == ["ReadWriteOnce"]
    assert mounted["/home/ray/mlflow"] == mounted["/home/ray/.mlflow"] == ["ReadWriteOnce"], (
        "as mlflow_server.sh has it"
    )
    for name in ("INFLORA_SHARED", "INFLORA_DATA", "HF_HOME"):
        (place,) = [path for path in mounted if config["data"][name].startswith(f"{path}/")]
        assert mounted[place] == ["ReadWriteMany"]


# Keys that are names of the user's own or of a resource, so that no schema can know them.
FREE = {"data", "limits", "requests", "rayStartParams"}


def test_a_misspelt_key_of_the_ray_job_is_refused():
    job = kuberay()[-1]
    paths = [path for path in typos(job) if not FREE & set(path[:-1])]
    assert len(paths) > 60
    for path in paths:
        with pytest.raises(jsonschema.ValidationError):
            check_ray_job(with_typo(job, path))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_nothing_is_mounted_where_it_would_be_imported_instead_of_the_package(name):
    """``ray submit`` runs ``~/recipe.py``: the home folder is first on the import path."""
    in_home = {target.removeprefix("~/").split("/")[0] for target in launcher(name)["file_mounts"]}
    assert in_home.isdisjoint({"inflora", "sweeps", "ray", "mlflow", "torch"})


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_mounted_file_is_there(name):
    sources = [Path(source) for source in launcher(name)["file_mounts"].values() if not source.startswith("~")]
    assert sources
    assert [source for source in sources if not (PROJECT / source).exists()] == []


def test_an_image_of_ones_own_holds_what_a_machine_would_install():
    """Then set-up finds the packages there, and installs the mounted code over the image's."""
    text = (CLUSTER / "gpu.yaml").read_text()
    stock, own = re.findall(r"^  (image: .*)\n  # (image: .*)", text, re.MULTILINE)[0]
    config = yaml.safe_load(text.replace(stock, own))
    check_launcher(config)
    assert (
        config["docker"]["image"]
        == kuberay()[-1]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    )
    copied = re.findall(r"^COPY --chown=ray (.*) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    mounted = [source for source in config["file_mounts"].values() if not source.startswith("~")]
    assert sorted(" ".join(copied).split()) == sorted(mounted)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_start_of_ray_asks_for_the_token_and_tells_nobody(name):
    config = launcher(name)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in config[key] if "ray start" in command]
        assert re.search(r"export [^;]*RAY_AUTH_MODE=token[^;]*;.*ray start", start)
        assert "RAY_USAGE_STATS_ENABLED=0" in start
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert "~/.ray/auth_token" in config["file_mounts"]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_a_recipe_on_a_machine_of_the_cluster_joins_it(name):
    """Left alone it would start a Ray of its own there."""
    (kept,) = [command for command in launcher(name)["setup_commands"] if "> ~/.inflora-cluster" in command]
    assert "'RAY_ADDRESS=auto'" in kept


def test_a_submitted_job_knows_the_cluster_where_bashrc_returns_early(tmp_path):
    """As Ubuntu's own does in a shell that nobody types into."""
    (kept,) = [command for command in launcher("local.yaml")["setup_commands"] if "> ~/.inflora-cluster" in command]
    (tmp_path / ".bashrc").write_text("case $- in *i*) ;; *) return;; esac\n. ~/.inflora-cluster\n")
    (line,) = re.findall(r"ray job submit .* -- (bash .*)", (CLUSTER / "README.md").read_text())
    assert "python -m sweeps.cifar100" in line
    told = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for command in (kept, line.replace("python -m sweeps.cifar100", "env > ~/seen")):
        subprocess.run(["bash", "-c", command], env=told, check=True)
    seen = (tmp_path / "seen").read_text().splitlines()
    assert {"INFLORA_SHARED=/mnt/inflora", f"INFLORA_STORAGE={tmp_path}/inflora-results", "RAY_ADDRESS=auto"} <= set(
        seen
    )


def test_slurm_reads_every_line_that_is_meant_for_it():
    """It reads none below the first command."""
    lines = (CLUSTER / "slurm.sbatch").read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert len([line for line in lines if line.startswith("#SBATCH")]) > 5
    assert [line for line in lines[first_command:] if line.startswith(("#SBATCH", "##SBATCH"))] == []


def test_no_trial_runs_on_a_head():
    assert "--num-cpus=0" in " ".join(launcher("local.yaml")["head_start_ray_commands"])
    gpu = launcher("gpu.yaml")
    assert gpu["available_node_types"][gpu["head_node_type"]]["resources"].items() >= {"CPU": 0, "GPU": 0}.items()
    assert kuberay()[-1]["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def resources(command_or_pod):
    """What ``ray start`` is told, in a command or in a pod's parameters, of resources of one's own."""
    if isinstance(command_or_pod, str):
        return json.loads(re.findall(r"--resources='(.*?)'", command_or_pod)[0])
    return json.loads(json.loads(command_or_pod["rayStartParams"]["resources"]))


def machines():
    """Of each file: what its head says of itself, what a machine that trains does, and how many of those there are."""
    gpu = launcher("gpu.yaml")
    types = gpu["available_node_types"]
    job = kuberay()[-1]["spec"]["rayClusterSpec"]
    (pods,) = job["workerGroupSpecs"]
    local = launcher("local.yaml")
    local_head, local_worker = (local[f"{role}_start_ray_commands"][-1] for role in ("head", "worker"))
    return {
        "gpu.yaml": (types["head"]["resources"], types["gpu"]["resources"], gpu["max_workers"]),
        "kuberay.yaml": (resources(job["headGroupSpec"]), resources(pods), pods["maxReplicas"]),
        "local.yaml": (resources(local_head), resources(local_worker), len(local["provider"]["worker_ips"])),
    }


@pytest.mark.parametrize("name", ["gpu.yaml", "kuberay.yaml", "local.yaml"])
def test_trials_are_driven_where_they_are_trained_and_the_head_says_how_many_there_can_be(name):
    head, machine, count = machines()[name]
    assert "trial_driver" not in head, "a driver would find room there"
    assert head["trials_at_a_time"] == count * machine["trial_driver"]


def test_the_pinned_versions_are_ones_that_the_package_accepts():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (CLUSTER / "constraints.txt").read_text(), re.MULTILINE))
    wanted = {r.name: r.specifier for r in map(Requirement, requires("inflora-sweeps") or []) if r.marker is None}
    assert set(pinned) <= set(wanted)
    assert [name for name, version in pinned.items() if not wanted[name].contains(version)] == []
    ray = pinned["ray"]
    assert launcher("gpu.yaml")["docker"]["image"].startswith(f"rayproject/ray:{ray}-")
    assert f"FROM rayproject/ray:{ray}-" in (CLUSTER / "Dockerfile").read_text()
    assert kuberay()[-1]["spec"]["rayClusterSpec"]["rayVersion"] == ray
