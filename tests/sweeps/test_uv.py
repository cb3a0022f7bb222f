"""A recipe under ``uv run``: Ray's own way with it would build every worker an environment anew."""

import pytest
import ray
from ray._private import ray_constants
from ray._private.runtime_env import uv_runtime_env_hook
from ray._private.worker import _maybe_modify_runtime_env

from inflora.config import ConfigError
from sweeps.engine.run.cluster import connect


def test_under_uv_run_workers_have_the_drivers_own_environment(monkeypatch):
    monkeypatch.setattr(uv_runtime_env_hook, "_get_uv_run_cmdline", lambda: ["uv", "run", "sweeps/digits.py"])
    monkeypatch.setattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    assert "py_executable" in _maybe_modify_runtime_env({}, False), "Ray would do it"
    given, told = {}, {}

    def init(**options):
        given.update(options["runtime_env"])
        told.update(_maybe_modify_runtime_env(options["runtime_env"], False))
        raise ConnectionError("as far as this goes")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match="as far as this goes"):
        connect("local", print)
    assert told == given and "env_vars" in given
