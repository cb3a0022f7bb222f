"""``cluster/gpu.yaml``: what its machines do while they are set up, and what is asked of Amazon."""

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml

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
