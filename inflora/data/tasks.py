"""How classes or domains are cut into tasks: the tasks' sizes, what does not fit, and the field's names of streams."""

from inflora.config import ConfigError, DataSettings, RunConfig, parse_config, sizes_named, stream_name
from inflora.data import ensure_store
from inflora.data.manifest import Manifest, read_manifest


def task_sizes(settings: DataSettings, classes: int) -> tuple[int, ...]:
    """The number of classifier outputs that each task brings; the settings are known to fit the ``classes``."""
    if settings.joint:
        return (classes,)
    if settings.scenario == "domain":
        return (classes,) * settings.task_count
    tasks = settings.tasks
    return tasks if isinstance(tasks, tuple) else (classes // settings.task_count,) * settings.task_count


def tasks_in_numbers(settings: DataSettings, manifest: Manifest) -> int | tuple[int, ...]:
    """``data.tasks`` as numbers: B0-Inc10 of 100 classes is 10, B50-Inc10 is 50, 10, 10, 10, 10, 10.

    Raises:
        ConfigError: The name does not divide the classes, or domains arrive.
    """
    tasks = settings.tasks
    if not isinstance(tasks, str):
        return tasks
    if settings.scenario == "domain":
        raise ConfigError(f"data.tasks={tasks} cuts classes: with data.scenario=domain give the number of domains")
    sizes = sizes_named(tasks, len(manifest.classes), settings.dataset)
    return len(sizes) if len(set(sizes)) == 1 else sizes


def check_tasks(settings: DataSettings, manifest: Manifest) -> None:
    """Raise ConfigError unless the classes or domains can be cut into the parts that ``data.tasks`` asks for."""
    classes, domains, tasks = len(manifest.classes), len(manifest.domains), tasks_in_numbers(settings, manifest)
    if settings.scenario == "domain":
        if tasks != domains or domains < 2:
            has = f"has {domains} ({', '.join(manifest.domains)})" if domains else "has none"
            raise ConfigError(
                f"data.scenario=domain takes one task per domain and {settings.dataset} {has}, got {tasks}"
            )
    elif isinstance(tasks, tuple):
        if sum(tasks) != classes:
            raise ConfigError(
                f"data.tasks must add up to the {classes} classes of {settings.dataset}, got {sum(tasks)}"
            )
    elif classes % tasks:
        divisors = [n for n in range(1, classes + 1) if classes % n == 0]
        raise ConfigError(
            f"data.tasks must divide the {classes} classes of {settings.dataset} "
            f"({', '.join(map(str, divisors))}), got {tasks}; for tasks of unequal size list their numbers of classes"
        )


def name_of_stream(settings: DataSettings, classes: int) -> str:
    """The field's name of a stream of so many ``classes``, as it is recorded: B0-Inc10, or what stands in its place."""
    if settings.joint:
        return "joint"
    if settings.scenario == "domain":
        return f"{settings.task_count} domains"
    return stream_name(task_sizes(settings, classes))


def in_numbers(config: RunConfig) -> RunConfig:
    """The config with the name of a stream, ``data.tasks=B0-Inc10``, written in numbers: the same run, the same hash.

    Raises:
        ConfigError: The name does not divide the dataset's classes, or there is no such dataset here.
    """
    if not isinstance(config.data.tasks, str):
        return config
    manifest = read_manifest(ensure_store(config.data.dataset, config.data.root))
    numbers = tasks_in_numbers(config.data, manifest)
    named = config.model_copy(update={"data": config.data.model_copy(update={"tasks": numbers})})
    return parse_config(named.model_dump())  # settings that do not fit these tasks are refused now
