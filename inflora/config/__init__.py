"""Every setting of a run, as frozen models that check themselves.

The dotted path of a setting (``method.rank``, ``method.energy``, ``optim.lr``) is its name everywhere: in YAML, on
the command line, in a search space, in Optuna, as an MLflow parameter and in the exported file.
"""

from inflora.config.base import ConfigError, Count, Flag, Number, Seed, Settings, ShortSeed, Whole
from inflora.config.identity import config_hash
from inflora.config.messages import cut, explain, shown
from inflora.config.methods import (
    AFTER_FIRST_TASK,
    AlignmentSettings,
    CODAPromptSettings,
    DualPromptSettings,
    FrozenSettings,
    InfLoRASettings,
    JointSettings,
    L2PSettings,
    LoRASettings,
    MethodSettings,
    NCMSettings,
    OLoRASettings,
    SDLoRASettings,
    SequentialSettings,
    Target,
)
from inflora.config.plain_yaml import YamlError, dump_yaml, read_regular, read_yaml, read_yaml_file, require_regular
from inflora.config.reading import checked, dump_config, load_config, override, parse_assignments, parse_config
from inflora.config.run import (
    AugmentSettings,
    BackboneSettings,
    DataSettings,
    FirstTaskSettings,
    OptimSettings,
    Precision,
    RunConfig,
)

__all__ = [
    "AFTER_FIRST_TASK",
    "AlignmentSettings",
    "AugmentSettings",
    "BackboneSettings",
    "CODAPromptSettings",
    "ConfigError",
    "Count",
    "DataSettings",
    "DualPromptSettings",
    "FirstTaskSettings",
    "Flag",
    "FrozenSettings",
    "InfLoRASettings",
    "JointSettings",
    "L2PSettings",
    "LoRASettings",
    "MethodSettings",
    "NCMSettings",
    "Number",
    "OLoRASettings",
    "OptimSettings",
    "Precision",
    "RunConfig",
    "SDLoRASettings",
    "Seed",
    "SequentialSettings",
    "Settings",
    "ShortSeed",
    "Target",
    "Whole",
    "YamlError",
    "checked",
    "config_hash",
    "cut",
    "dump_config",
    "dump_yaml",
    "explain",
    "load_config",
    "override",
    "parse_assignments",
    "parse_config",
    "read_regular",
    "read_yaml",
    "read_yaml_file",
    "require_regular",
    "shown",
]
