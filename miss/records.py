"""What a file says of each adapter besides its tensor. Every field that is read is checked."""

from typing import Any, NamedTuple

from miss.errors import CheckpointError, MissError, named
from miss.forms import LayerConfig
from miss.layers import file_path, host_named, path_of
from miss.layers.host import d_name
from miss.layers.linear import LinearHost
from miss.merging import Place
from miss.tree import joined

__all__ = ["About", "Record", "described", "parse", "record_of"]


class Record(NamedTuple):
    """What a file says of one adapted Parameter: module, own name, host and settings."""

    module: str
    parameter: str
    host: str
    config: LayerConfig

    @property
    def key(self) -> str:
        """The key of its D in a state or file."""
        return joined(self.module, d_name(self.parameter))


def record_of(place: Place) -> Record:
    """The record of an adapted Parameter."""
    return Record(place.name, place.parameter, file_path(place.layer.miss_host), place.config)


def described(record: Record) -> dict[str, Any]:
    """A record as JSON."""
    module = {"module": record.module, "parameter": record.parameter, "host": record.host}
    return module | record.config.fields()


class About(NamedTuple):
    """A file's description: adapters and other tensors by key, and which of these are trained."""

    records: dict[str, Record]
    extra: set[str]
    trained: set[str]


def parse(about: dict[str, Any]) -> About:
    """A file's description of its adapters and extra tensors; every field is checked."""
    adapters, extra = about.get("adapters"), about.get("extra")
    trained = about.get("trained", extra)  # format 1 holds what is trained alone
    if about["format"] == 1:
        modules = about.get("modules")
        adapters = _of_format_1(modules) if isinstance(modules, dict) else None
    if not isinstance(adapters, dict) or not adapters:
        raise CheckpointError("its metadata lists no adapted modules")
    if not isinstance(extra, list) or not all(isinstance(key, str) for key in extra):
        raise CheckpointError("its metadata lists no extra tensors")
    if not isinstance(trained, list) or any(key not in extra for key in trained):
        raise CheckpointError("its metadata lists trained tensors that are none of its extra ones")
    records = {}
    for key, fields in adapters.items():
        rule = f"metadata of {key!r}: not the settings of an adapter"
        try:
            record = _record(dict(fields))
        except CheckpointError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            actual = error.actual if isinstance(error, MissError) else None
            raise CheckpointError(rule, actual=actual) from error
        if record.key != key or not isinstance(record.module, str):
            raise CheckpointError(rule, expected=f"those of {record.key}")
        records[key] = record
    return About(records, set(extra), set(trained))


def _of_format_1(modules: dict[str, Any]) -> dict[str, Any]:
    """A description of format 1, which knew only linear layers, turned into one of format 2."""
    linear = {"parameter": "weight", "host": path_of(LinearHost)}
    adapters = {}
    for name, fields in modules.items():
        known = isinstance(fields, dict)
        adapters[joined(name, "miss_D")] = {"module": name} | linear | fields if known else fields
    return adapters


def _record(fields: dict[str, Any]) -> Record:
    module, parameter, path = fields.pop("module"), fields.pop("parameter"), fields.pop("host")
    host = host_named(path)
    if host is None:
        rule = f"{named(module)} needs a host that is not registered here"
        do = "run miss.register for it first"
        raise CheckpointError(rule, expected=path, do=do)
    return Record(module, parameter, path, LayerConfig.from_fields(fields, host.axes[parameter]))
