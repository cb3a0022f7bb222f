"""Every setting of a run, as frozen models that check themselves.

The dotted path of a setting (``adapter.rank``, ``adapter.energy``, ``optim.lr``) is its name everywhere: in YAML, on
the command line, in a search space, in Optuna, as an MLflow parameter and in the exported file.
"""

from inflora.config.adapters import (
    ADAPTERS,
    AdaptedSettings,
    CODAPromptSettings,
    DualPromptSettings,
    E2LoRASettings,
    FixedRankSettings,
    InfLoRASettings,
    L2PSettings,
    LoRASettings,
    LowRankSettings,
    NoAdapterSettings,
    OLoRASettings,
    PromptSettings,
    SDLoRASettings,
    Target,
)
from inflora.config.alternatives import Alternative, build
from inflora.config.base import ConfigError, Count, Flag, Number, Seed, Settings, ShortSeed, Whole
from inflora.config.classifiers import (
    CLASSIFIERS,
    AlignedSettings,
    FittedSettings,
    LDASettings,
    LinearSettings,
    NCMSettings,
    QDASettings,
    RanPACSettings,
)
from inflora.config.identity import config_hash
from inflora.config.messages import cut, explain, shown
from inflora.config.methods import METHODS, felt_after_first_task, method_of, settings_of_method
from inflora.config.plain_yaml import YamlError, dump_yaml, read_yaml, read_yaml_file
from inflora.config.reading import (
    checked,
    dump_config,
    load_config,
    override,
    parse_assignments,
    parse_config,
    parse_duration_s,
    parse_seeds,
)
from inflora.config.renamed import refuse_old_names
from inflora.config.run import (
    AugmentSettings,
    BackboneSettings,
    DataSettings,
    FirstTaskSettings,
    OptimSettings,
    Precision,
    ReplaySettings,
    RunConfig,
    pycil_seed,
)
from inflora.config.streams import sizes_named, stream_name
