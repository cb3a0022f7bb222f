"""``cluster/gpu.yaml``: what its machines do while they are set up, and what is asked of Amazon."""

import copy
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from moto.core.authorization import enable_iam_authentication
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import NodeState
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind
from ray.train import Checkpoint
from ray.train.v2._internal.execution.storage import StorageContext, delete_fs_path

from inflora.storage import SharedFolder

PROJECT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((PROJECT / "cluster" / "gpu.yaml").read_text())
PYTHON = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def set_up(home, wanted):
    """Run the set-up command in which ``wanted`` stands as a new machine does, with ``home`` for its home folder."""
    commands = [*CONFIG["setup_commands"], *CONFIG["worker_setup_commands"]]
    (command,) = [each for each in commands if wanted in each]
    (home / "inflora-project").symlink_to(PROJECT)
    machine = {**os.environ, "HOME": str(home), "PATH": PYTHON, "PYTHONPATH": str(PROJECT)}
    command = command.replace("BUCKET", "bucket")
    return subprocess.run(["bash", "-c", command], env=machine, cwd=home, capture_output=True, text=True)


def test_a_new_machine_has_the_datasets_of_the_bucket(bucket, tmp_path):
    boto3.client("s3").put_object(Bucket="bucket", Key="data/cifar100/manifest.json", Body=b"{}")
    done = set_up(tmp_path, "/data ")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".cache/inflora/data/cifar100/manifest.json").read_bytes() == b"{}"


def test_a_new_machine_asks_no_hub_for_weights_that_are_in_the_bucket(bucket, tmp_path):
    """As the hub's cache has them, with files in the place of links."""
    model, name = "models--timm--vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k"
    place = boto3.resource("s3").Bucket("bucket")
    place.put_object(Key=f"weights/{model}/refs/main", Body=b"0123abc")
    place.put_object(Key=f"weights/{model}/snapshots/0123abc/model.safetensors", Body=b"weights")
    done = set_up(tmp_path, "/weights ")
    assert done.returncode == 0, done.stderr
    ask = f"from inflora.pretrained import from_cache; print(from_cache({name!r})['file'])"
    machine = {"HOME": str(tmp_path), "PATH": PYTHON, "PYTHONPATH": str(PROJECT)}
    found = subprocess.run([sys.executable, "-c", ask], env=machine, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).read_bytes() == b"weights"
    assert Path(found.strip()).is_relative_to(tmp_path)


@pytest.mark.parametrize("there", [(), ("other/file", "data.txt")])
def test_a_bucket_without_datasets_fails_the_set_up_in_one_line(there, bucket, tmp_path):
    place = boto3.resource("s3").Bucket("bucket")
    place.objects.all().delete()
    for key in there:
        place.put_object(Key=key, Body=b"")
    done = set_up(tmp_path, "/data ")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: there is nothing in s3://bucket/data: see cluster/README.md, AWS, step 2\n"


def test_a_bucket_that_cannot_be_read_fails_the_set_up_in_one_line(monkeypatch, bucket, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = set_up(tmp_path, "/data ")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot copy s3://bucket/data to ") and done.stderr.count("\n") == 1


def test_a_machine_whose_driver_does_not_do_fails_the_set_up_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = set_up(tmp_path, "inflora.cuda")
    assert done.returncode == 1
    assert done.stderr.startswith("PyTorch finds no CUDA device here (") and done.stderr.count("\n") == 1


def test_every_machine_has_a_current_driver_and_docker():
    """A public parameter of Amazon's, which EC2 itself looks up; Ray passes on what it does not know."""
    images = {each["node_config"]["ImageId"] for each in CONFIG["available_node_types"].values()}
    (image,) = images
    assert image.startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-")
    assert image.endswith("/latest/ami-id")


def asked_of_amazon(config, trials, running=()):
    """How many machines Ray's autoscaler starts and ends where so many trials wait for one."""
    autoscaling = AutoscalingConfig(prepare_config(copy.deepcopy(config)))
    request = SchedulingRequest(
        disable_launch_config_check=autoscaling.disable_launch_config_check(),
        node_type_configs=autoscaling.get_node_type_configs(),
        max_num_nodes=autoscaling.get_max_num_worker_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"trial_driver": 1})] * trials),
        current_instances=list(running),
    )
    reply = ResourceDemandScheduler().schedule(request)
    return {each.instance_type: each.count for each in reply.to_launch}, len(reply.to_terminate)


def running_machine(config, name):
    """A machine of the file's GPU type as it is when a trial keeps it busy."""
    known = AutoscalingConfig(prepare_config(copy.deepcopy(config))).get_node_type_configs()["gpu"]
    instance = Instance(
        instance_id=name,
        instance_type="gpu",
        status=Instance.RAY_RUNNING,
        node_kind=NodeKind.WORKER,
        node_id=name,
        launch_config_hash=known.launch_config_hash,
    )
    busy = NodeState(total_resources=known.resources, available_resources={"CPU": 7})
    return AutoscalerInstance(cloud_instance_id=name, ray_node=busy, im_instance=instance)


@pytest.mark.parametrize(("trials", "machines"), [(1, 1), (8, 8), (20, 8)])
def test_a_waiting_trial_brings_a_machine_up_to_the_most_that_there_may_be(trials, machines):
    assert asked_of_amazon(CONFIG, trials) == ({"gpu": machines}, 0)


def test_without_its_line_on_spot_further_machines_come_on_demand_and_those_that_run_stay(tmp_path):
    """As the README says it: by ``sed``, and the file is read again by an autoscaler that runs."""
    (command,) = re.findall(
        r"^(sed .*MarketType.*) && ray up", (PROJECT / "cluster/README.md").read_text(), re.MULTILINE
    )
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/gpu.yaml").write_text((PROJECT / "cluster/gpu.yaml").read_text())
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    on_demand = yaml.safe_load((tmp_path / "cluster/gpu.yaml").read_text())
    types = CONFIG["available_node_types"], on_demand["available_node_types"]
    machine, changed = (copy.deepcopy(each["gpu"]["node_config"]) for each in types)
    assert machine.pop("InstanceMarketOptions") == {"MarketType": "spot"} and machine == changed
    assert all("InstanceMarketOptions" not in each["head"]["node_config"] for each in types)

    spot = [running_machine(CONFIG, name) for name in ("one", "two")]
    assert asked_of_amazon(on_demand, 3, spot) == ({"gpu": 3}, 0)


@pytest.fixture
def on_a_worker(bucket, monkeypatch):
    """From here on the bucket asks who calls, and it is a GPU machine with the policy of its role."""
    iam = boto3.client("iam")
    iam.create_user(UserName="worker")
    policy = json.loads((PROJECT / "cluster/aws-worker.json").read_text().replace("BUCKET", "bucket"))
    # Moto's own: S3 asks for the right to each file where many are deleted at once, and for ListBucket at HeadBucket.
    moto = {"Effect": "Allow", "Action": ["s3:DeleteObject", "s3:HeadBucket"], "Resource": "arn:aws:s3:::bucket"}
    policy["Statement"] += [moto]
    iam.put_user_policy(UserName="worker", PolicyName="bucket", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName="worker")["AccessKey"]
    place = boto3.resource("s3").Bucket("bucket")
    for name in ("data/cifar100/manifest.json", "mlflow/secret", "sweeps/digits/study.db"):
        place.put_object(Key=name, Body=b"{}")
    with enable_iam_authentication():
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        yield SharedFolder(f"{bucket}/sweeps/digits")
    iam.delete_access_key(UserName="worker", AccessKeyId=key["AccessKeyId"])
    iam.delete_user_policy(UserName="worker", PolicyName="bucket")
    iam.delete_user(UserName="worker")


def test_the_workers_role_lets_them_do_what_a_trial_does(on_a_worker, tmp_path):
    assert set_up(tmp_path, "/data ").returncode == 0
    on_a_worker.require()
    assert on_a_worker.read("study.db") == b"{}" and on_a_worker.read("missing") is None
    large = os.urandom(12 * 2**20)  # in several parts
    on_a_worker.write("trials/0000/state", large)
    with on_a_worker.fetched("trials/0000") as folder:
        assert (folder / "state").read_bytes() == large
    assert on_a_worker.folders("trials") == {"0000"} and on_a_worker.bytes_in("trials") == len(large)
    on_a_worker.delete("trials/0000/state")
    on_a_worker.write("trials/0001/state", b"")
    on_a_worker.discard("trials")
    assert on_a_worker.folders("trials") == set()
    # As Ray Train keeps a checkpoint.
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state").write_bytes(b"state")
    storage = StorageContext(storage_path="s3://bucket/sweeps/digits/trials", experiment_dir_name="0002")
    storage.persist_current_checkpoint(Checkpoint(str(tmp_path / "checkpoint")), "checkpoint")
    delete_fs_path(storage.storage_filesystem, storage.experiment_fs_path)
    assert on_a_worker.folders("trials") == set()


def test_the_workers_role_lets_them_do_nothing_else(on_a_worker):
    s3 = boto3.Session().client("s3")
    elsewhere = {"Bucket": "bucket", "Key": "mlflow/secret"}
    for refused in (
        lambda: s3.get_object(**elsewhere),
        lambda: s3.put_object(**elsewhere, Body=b""),
        lambda: s3.delete_object(Bucket="bucket", Key="data/cifar100/manifest.json"),
        lambda: s3.put_object(Bucket="bucket", Key="weights/model", Body=b""),
        lambda: s3.delete_bucket(Bucket="bucket"),
        lambda: s3.create_bucket(Bucket="another"),
        lambda: s3.list_buckets(),
        lambda: s3.put_bucket_policy(Bucket="bucket", Policy="{}"),
    ):
        with pytest.raises(ClientError, match="AccessDenied"):
            refused()


# The watcher of spot machines.


@pytest.fixture
def watcher():
    spec = importlib.util.spec_from_file_location("spot_watcher", PROJECT / "cluster" / "spot_watcher.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cluster_that_is_busy_is_told_again_until_the_machine_goes(watcher, monkeypatch):
    errors, told = [ConnectionError, RuntimeError, TimeoutError], []

    def drain(left_s):
        told.append(left_s)
        if errors:
            raise errors.pop(0)("busy")

    monkeypatch.setattr(watcher, "_drain", drain)
    watcher.drain(datetime.now(UTC) + timedelta(seconds=120), every_s=0.0)
    assert len(told) == 4 and all(100 < seconds <= 120 for seconds in told)
    errors.append(ConnectionError)
    with pytest.raises(ConnectionError):
        watcher.drain(datetime.now(UTC), every_s=0.0)
    assert told[4:] == [1]


@pytest.mark.parametrize(("name", "ended"), [("spot_watcher.py", True), ("another.py", False)])
def test_a_watcher_ends_the_one_of_an_earlier_start_and_nothing_else(watcher, tmp_path, name, ended):
    file = tmp_path / "pid"
    other = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()", name], stdin=-1, stdout=-1)
    try:
        other.stdout.readline()
        file.write_text(str(other.pid))
        watcher.replace_previous(file)
        assert file.read_text() == str(os.getpid())
        if ended:
            assert other.wait(10) == -signal.SIGTERM
        else:
            assert other.poll() is None
    finally:
        other.communicate(b"\n")
    watcher.replace_previous(file)  # its own number, from before a new start
    file.write_text("nothing")
    watcher.replace_previous(file)
    assert file.read_text() == str(os.getpid())
