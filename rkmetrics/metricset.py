"""What users declare metrics with. The catalogue is the MetricSets that exist.

    class Chat(rk.MetricSet):
        messages = rk.Counter("chat_messages_total", "Messages handled.", kind=rk.OneOf("text", "image"))
        members  = rk.Gauge("chat_members", "Members in rooms.", across="sum")

A declaration is checked where it stands. Binding a set gives an instance whose attributes are cells:
`registry.bind(Chat, actor_name="lobby").members.set(12)`. All cells of one bound set lie side by side in one block of
memory, so a snapshot is a copy of the same slice of each block, and releasing a name takes one block out of what is
exposed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Protocol, TypeVar, cast, overload
from weakref import ref

from rkmetrics.cells import PEAK_REGION, PEAK_SLOTS, Block, Bounds, CounterCell, GaugeCell, HistogramCell, gather
from rkmetrics.definition import OTHER, RESERVED, RESERVED_NAMES, LabelDefinition, MetricDefinition, Rename, check
from rkmetrics.errors import DefinitionError
from rkmetrics.memory import Exemplars
from rkmetrics.model import UNSET_BYTES, MetricFamily, MetricType, Shape

__all__ = [
    "LATENCY",
    "SIZE",
    "Cells",
    "Column",
    "Counter",
    "Gauge",
    "Histogram",
    "Info",
    "Layout",
    "Metric",
    "MetricSet",
    "OneOf",
    "Overflowed",
    "Peak",
    "Registered",
    "RegisteredCells",
    "Rename",
]

#: Bucket bounds for durations of requests and calls, in seconds: 1 ms to 60 s, fifteen of them.
LATENCY: tuple[float, ...] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip

#: Bucket bounds for sizes in bytes: 256 B to 64 MiB, by fours.
SIZE: tuple[float, ...] = tuple(float(256 * 4**k) for k in range(10))

_ZERO_BYTES = struct.pack("=d", 0.0)


class OneOf:
    """A closed label: its values, as words or as one enumeration class.

    `OneOf("text", "image")`, `OneOf(Outcome)`. Whatever else is used at run time counts as "__other__" of this label.
    """

    __slots__ = ("values",)

    def __init__(self, *values: str | type[Enum]) -> None:
        self.values: tuple[str, ...] = tuple(_words(values))


def _words(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, type) and issubclass(value, Enum):
            yield from (str(member.value) for member in value)
        elif isinstance(value, str):
            yield str(value.value) if isinstance(value, Enum) else value
        else:
            raise DefinitionError(
                "rk.OneOf", f"{value!r} is neither text nor an enumeration", "pass words: OneOf('a', 'b')"
            )


class Registered:
    """A label whose values the program registers while it runs (collectors, declared metrics), never its traffic.

    Only sets without actor_name may have one; `described` says whose names they are.
    """

    __slots__ = ("described",)

    def __init__(self, described: str) -> None:
        self.described = described


#: How the worker processes of one service combine a gauge.
Across = Literal["sum", "max", "min", "mean", "latest"]

CellT = TypeVar("CellT")
SetT = TypeVar("SetT", bound="MetricSet")


class Overflowed(Protocol):
    """Told of each label value that was not declared. Returns if it may count as __other__, raises if it must not."""

    def __call__(self, metric: str, label: LabelDefinition, value: object) -> None: ...


class Cells(dict["str | tuple[str, ...]", CellT], Generic[CellT]):
    """The cells of a labelled metric: `cells["text"]`, or `cells["text", "ok"]` for two labels, in their declared
    order.

    A value that was not declared gives the cell of "__other__" in its place; it is counted, said in the log, and
    never stored. Keep the cell where the path is hot.
    """

    __slots__ = ("_bound", "_column")

    def __init__(self, bound: MetricSet, column: Column) -> None:
        super().__init__()
        self._bound, self._column = bound, column

    def __missing__(self, key: str | tuple[str, ...]) -> CellT:
        return cast("CellT", self._bound._child(self, self._column, key))

    def __contains__(self, key: object) -> bool:
        """Whether every value of a key was declared."""
        values = cast("tuple[object, ...]", key) if isinstance(key, tuple) else (key,)
        labels = self._column.definition.labels
        pairs = zip(values, labels, strict=False)
        return len(values) == len(labels) and all(value in label.values for value, label in pairs)

    def __setitem__(self, key: object, value: object) -> NoReturn:
        raise TypeError(f"{self._column.definition.name}: cells are not replaced; update the one that is there")

    if not TYPE_CHECKING:  # a type checker would take every name for one that is there

        def __getattr__(self, name: str) -> NoReturn:
            labels = self._column.definition.labels
            example = ", ".join(repr(label.values[0] if label.values else label.name) for label in labels)
            metric = self._column.definition.name
            raise AttributeError(f"{metric} has labels: choose their values before .{name}, as in [{example}]")

    def __repr__(self) -> str:
        definition = self._column.definition
        return f"<{definition.name} by {', '.join(label.name for label in definition.labels)}>"


class Metric(Generic[CellT]):
    """A declared metric; on a bound set its name gives the cell, or the cells by label value."""

    definition: MetricDefinition
    attribute: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        if not issubclass(owner, MetricSet):
            raise DefinitionError(
                self.definition.name,
                f"declared in {owner.__name__}, which is not a MetricSet",
                "derive it from rk.MetricSet",
            )
        self.attribute = name

    @overload
    def __get__(self, instance: None, owner: type) -> Metric[CellT]: ...
    @overload
    def __get__(self, instance: MetricSet, owner: type) -> CellT: ...
    def __get__(self, instance: MetricSet | None, owner: type) -> Metric[CellT] | CellT:
        if instance is None:
            return self
        # Not a data descriptor: what is stored in the instance is found there from now on.
        return cast("CellT", instance.__dict__.setdefault(self.attribute, instance._cell(self)))

    def make(self, block: Block, offset: int, peak: int) -> object:
        """The cell of one series. peak: where the gauge's peak lies, or -1."""
        raise NotImplementedError

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            known = self.__dict__.get("definition")
            declared = f"{type(self).__name__} {known.name}" if known else "this"
            raise AttributeError(f"{declared} is a declaration: bind its set first, and use .{name} of the cell there")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.definition.name}>"


def _define(
    name: str, type: MetricType, help: str, labels: dict[str, OneOf | Registered], **more: Any
) -> MetricDefinition:
    return check(MetricDefinition(name, type, help, tuple(_label(name, *item) for item in labels.items()), **more))


def _label(metric: str, name: str, values: object) -> LabelDefinition:
    if isinstance(values, OneOf):
        return LabelDefinition(name, values.values)
    if isinstance(values, Registered):
        return LabelDefinition(name, (), values.described)
    raise DefinitionError(
        metric,
        f"label {name!r} is unbounded: {values!r} does not say which values it has",
        f"write {name}=rk.OneOf('a', 'b'); what identifies one instance belongs in an exemplar",
    )


class Counter(Metric[CellT]):
    """Declare a number that only rises. Its name ends in _total.

    Keyword arguments that are not options below are labels, each a OneOf. exception: why the name breaks a naming rule.
    Raises DefinitionError at once, with the metric, the rule and what to do.
    """

    @overload
    def __init__(
        self: Counter[CounterCell],
        name: str, help: str, /, *, renamed_from: Iterable[Rename] = (), exception: str = "",
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: Counter[Cells[CounterCell]],
        name: str, help: str, /, *, renamed_from: Iterable[Rename] = (), exception: str = "", **labels: OneOf |
        Registered,
    ) -> None: ...  # fmt: skip
    def __init__(
        self,
        name: str,
        help: str,
        /,
        *,
        renamed_from: Iterable[Rename] = (),
        exception: str = "",
        **labels: OneOf | Registered,
    ) -> None:
        more = {"renamed_from": tuple(renamed_from), "exception": exception}
        self.definition = _define(name, MetricType.COUNTER, help, labels, **more)

    def make(self, block: Block, offset: int, peak: int) -> object:
        return CounterCell(block, offset)


class Gauge(Metric[CellT]):
    """Declare a number that goes up and down. It has no series until it is set.

    across: how worker processes combine: "sum", "max", "min", "mean" or "latest"; there is no default, as none is
    right for all.
    """

    @overload
    def __init__(
        self: Gauge[GaugeCell],
        name: str, help: str, /, *, across: Across, renamed_from: Iterable[Rename] = (), exception: str = "",
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: Gauge[Cells[GaugeCell]],
        name: str, help: str, /, *, across: Across, renamed_from: Iterable[Rename] = (), exception: str = "",
        **labels: OneOf | Registered,
    ) -> None: ...  # fmt: skip
    def __init__(
        self,
        name: str,
        help: str,
        /,
        *,
        across: str = "",
        renamed_from: Iterable[Rename] = (),
        exception: str = "",
        **labels: OneOf | Registered,
    ) -> None:
        more = {"across": across, "renamed_from": tuple(renamed_from), "exception": exception}
        self.definition = _define(name, MetricType.GAUGE, help, labels, **more)

    def make(self, block: Block, offset: int, peak: int) -> object:
        return GaugeCell(block, offset, peak)


class Histogram(Metric[CellT]):
    """Declare a distribution. buckets: upper bounds, increasing, without +Inf, in the unit of the name.

    native: count in sparse exponential buckets as well (schema 3, at most 9 % wide), which protobuf and OTLP carry.
    """

    @overload
    def __init__(
        self: Histogram[HistogramCell],
        name: str, help: str, /, *, buckets: Iterable[float] = LATENCY, native: bool = False,
        renamed_from: Iterable[Rename] = (), exception: str = "",
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: Histogram[Cells[HistogramCell]],
        name: str, help: str, /, *, buckets: Iterable[float] = LATENCY, native: bool = False,
        renamed_from: Iterable[Rename] = (), exception: str = "", **labels: OneOf | Registered,
    ) -> None: ...  # fmt: skip
    def __init__(
        self,
        name: str,
        help: str,
        /,
        *,
        buckets: Iterable[float] = LATENCY,
        native: bool = False,
        renamed_from: Iterable[Rename] = (),
        exception: str = "",
        **labels: OneOf | Registered,
    ) -> None:
        bounds = tuple(float(bound) for bound in buckets)
        more = {"bounds": bounds, "native": native, "renamed_from": tuple(renamed_from), "exception": exception}
        self.definition = _define(name, MetricType.HISTOGRAM, help, labels, **more)
        self._bounds = Bounds(bounds, native)

    def make(self, block: Block, offset: int, peak: int) -> object:
        return HistogramCell(block, offset, self._bounds)


class Peak(Metric[None]):
    """Declare the highest value that another gauge of the set had within the last `window_seconds`.

    It keeps visible what rises and falls between two scrapes. `of` is an unlabelled gauge declared above it.
    """

    def __init__(
        self, name: str, help: str, /, *, of: Metric[GaugeCell], window_seconds: float = 120.0, exception: str = ""
    ) -> None:
        if of.definition.labels:
            raise DefinitionError(name, "the peak of a labelled gauge", "declare the peak of an unlabelled one")
        across = of.definition.across
        self.of = of
        more = {"across": across, "window_seconds": window_seconds, "exception": exception}
        self.definition = _define(name, MetricType.GAUGE, help, {}, **more)

    def make(self, block: Block, offset: int, peak: int) -> object:
        raise AttributeError(f"{self.definition.name} is read from the gauge it watches; update that one")


class Info(Metric["Cells[GaugeCell]"]):
    """Declare a constant 1 whose labels the program fills in once (a version, a build). Sets without actor_name
    only."""

    def __init__(self, name: str, help: str, /, **labels: Registered) -> None:
        # The text formats of Prometheus have no info type; every client writes a gauge that is 1.
        exception = "a constant that describes the process: the _info suffix is the convention"
        more = {"across": "max", "exception": exception}
        self.definition = _define(name, MetricType.GAUGE, help, dict(labels), **more)

    def make(self, block: Block, offset: int, peak: int) -> object:
        return GaugeCell(block, offset)


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """Where a metric lies in its set's blocks: `count` numbers from `offset`. make: (block, offset, peak) to a cell."""

    definition: MetricDefinition
    make: Callable[[Block, int, int], object]
    shape: Shape
    offset: int
    count: int
    peak: int = -1
    places: tuple[dict[str, int], ...] = ()

    def place(self, values: tuple[str, ...]) -> int:
        """The offset of the series with these label values, all of which exist."""
        index = 0
        for value, places in zip(values, self.places, strict=True):
            index = index * len(places) + places[value]
        return self.offset + index * self.shape.width


class Layout:
    """How the blocks of a set look: columns, size, and the image that a new block starts as."""

    def __init__(self, metrics: Iterable[Metric[Any]]) -> None:
        self.columns: dict[str, Column] = {}
        image: list[bytes] = []
        size = 0
        for metric in metrics:
            column, start = _column(metric, size, self.columns)
            self.columns[metric.attribute] = column
            image.append(start)
            size += len(start) // 8
        self.image = b"".join(image)


def _column(metric: Metric[Any], offset: int, columns: dict[str, Column]) -> tuple[Column, bytes]:
    """A metric's column at `offset`, and the numbers it starts as."""
    definition, shape = metric.definition, metric.definition.shape()
    if isinstance(metric, Peak):
        gauge = columns[metric.of.attribute]
        slot = struct.pack("=d", definition.window_seconds / (PEAK_SLOTS - 1))
        columns[metric.of.attribute] = replace(gauge, peak=offset)
        empty = struct.pack("=d", -1.0) * (PEAK_REGION - 1)
        return Column(definition, metric.make, shape, gauge.offset, 1, offset), slot + empty
    if definition.dynamic:
        return Column(definition, metric.make, shape, offset, 0), b""
    places = tuple({value: i for i, value in enumerate((*label.values, OTHER))} for label in definition.labels)
    zero, unset = _ZERO_BYTES * shape.width, UNSET_BYTES + _ZERO_BYTES * (shape.width - 1)
    starts = [zero if definition.starts_at_zero and OTHER not in combo else unset for combo in shape.combos]
    count = len(shape.combos) * shape.width
    return Column(definition, metric.make, shape, offset, count, -1, places), b"".join(starts)


_declared: dict[str, tuple[ref[type[MetricSet]], MetricDefinition]] = {}


class MetricSet:
    """The metrics of one subject, declared once. `class Chat(rk.MetricSet)`; bind it with `registry.bind(Chat,
    actor_name=...)`.

    `class Node(rk.MetricSet, per_actor=False)` has no actor_name label, for what a process has once.
    """

    layout: Layout
    per_actor: bool = True
    actor_name: str
    start_time: float

    def __init_subclass__(cls, *, per_actor: bool | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if per_actor is not None:
            cls.per_actor = per_actor
        metrics = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
        own: list[Metric[Any]] = [metric for metric in metrics.values() if isinstance(metric, Metric)]
        names: dict[str, str] = {}
        for metric in own:
            _declare(cls, metric)
            for name in metric.definition.sample_names():
                if name in names:
                    rule = f"{cls.__name__} has the name {name!r} already, in {names[name]!r}"
                    raise DefinitionError(metric.definition.name, rule, "choose another name")
                names[name] = metric.attribute
        cls.layout = Layout(own)

    def __init__(self) -> None:
        raise TypeError(
            f"{type(self).__name__} is bound, not made: registry.bind({type(self).__name__}, actor_name='...')"
        )

    @classmethod
    def definitions(cls) -> tuple[MetricDefinition, ...]:
        """The metrics of this set, in the order of their declaration."""
        return tuple(column.definition for column in cls.layout.columns.values())

    @classmethod
    def _bind(
        cls: type[SetT],
        actor_name: str,
        block: Block,
        exemplars: Exemplars | None,
        overflowed: Overflowed,
        start_time: float,
    ) -> SetT:
        bound = cls.__new__(cls)
        bound.__dict__.update(
            actor_name=actor_name,
            start_time=start_time,
            _block=block,
            _exemplars=exemplars,
            _overflowed=overflowed,
        )
        return bound

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: object) -> NoReturn:
            declared = name in type(self).layout.columns
            how = "update the cell: .set(), .inc() or .observe()" if declared else "declare it in the class"
            raise AttributeError(f"{type(self).__name__}.{name} cannot be assigned; {how}")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}{f' actor_name={self.actor_name!r}' if self.per_actor else ''}>"

    _block: Block
    _exemplars: Exemplars | None
    _overflowed: Overflowed

    def _cell(self, metric: Metric[Any]) -> Any:
        column = type(self).layout.columns[metric.attribute]
        if metric.definition.dynamic:
            return RegisteredCells(self, column)
        return (
            Cells[Any](self, column)
            if metric.definition.labels
            else column.make(self._block, column.offset, column.peak)
        )

    def _child(self, cells: Cells[Any], column: Column, key: object) -> object:
        definition = column.definition
        values: tuple[object, ...] = cast("tuple[object, ...]", key) if isinstance(key, tuple) else (key,)
        if len(values) != len(definition.labels):
            names = ", ".join(label.name for label in definition.labels)
            raise TypeError(f"{definition.name} takes a value for each of ({names}); got {key!r}")
        known = tuple([self._known(column, i, value) for i, value in enumerate(values)])
        name = known if len(known) != 1 else known[0]
        # dict.get, as a look-up by index would come back here; setdefault, as another thread may have been first.
        cell = cells.get(name)
        return cell if cell is not None else cells.setdefault(name, column.make(self._block, column.place(known), -1))

    def _known(self, column: Column, index: int, value: object) -> str:
        definition = column.definition
        word = str(value.value) if isinstance(value, Enum) else value
        if isinstance(word, str) and word in column.places[index]:
            return str(word)
        self._overflowed(definition.name, definition.labels[index], value)
        return OTHER


def _declare(cls: type[MetricSet], metric: Metric[Any]) -> None:
    """Check a metric against its set and against all sets declared so far."""
    definition = metric.definition = replace(metric.definition, per_actor=cls.per_actor)
    if metric.attribute in vars(MetricSet) or metric.attribute in MetricSet.__annotations__:
        raise DefinitionError(
            definition.name, f"the attribute {metric.attribute!r} belongs to MetricSet", "choose another name"
        )
    taken = definition.name in RESERVED_NAMES or definition.name.startswith(RESERVED)
    if taken and cls.__module__.partition(".")[0] != "rkmetrics":
        raise DefinitionError(
            definition.name, "the name is, or may become, one of rkmetrics' own", "use your own prefix"
        )
    if cls.per_actor and definition.dynamic:
        raise DefinitionError(
            definition.name,
            "labels registered at run time need a set without actor_name",
            "declare the set with per_actor=False",
        )
    known = _declared.get(definition.name)
    owner = known[0]() if known else None
    if known and owner and owner is not cls and not _redefines(cls, owner) and known[1] != definition:
        raise DefinitionError(
            definition.name,
            f"declared with another shape in {owner.__module__}.{owner.__qualname__}",
            "use that declaration, or another name",
        )
    _declared[definition.name] = (ref(cls), definition)


def _redefines(cls: type, owner: type) -> bool:
    """Whether cls is owner again (a module reloaded, a notebook's cell run twice), or is derived from it."""
    return (cls.__module__, cls.__qualname__) == (owner.__module__, owner.__qualname__) or issubclass(cls, owner)


class RegisteredCells(Cells[Any]):
    """The cells of a metric whose label values are registered at run time; each has memory of its own.

    LIMIT of them at most, as registering can go wrong too; what comes later shares the cell of "__other__".
    """

    __slots__ = ("_blocks",)

    LIMIT = 1000

    def __init__(self, bound: MetricSet, column: Column) -> None:
        super().__init__(bound, column)
        self._blocks: dict[tuple[str, ...], Block] = {}

    def __missing__(self, key: str | tuple[str, ...]) -> Any:
        definition = self._column.definition
        values = tuple(str(value) for value in (key if isinstance(key, tuple) else (key,)))
        if len(values) != len(definition.labels):
            raise TypeError(f"{definition.name} takes {len(definition.labels)} label values; got {key!r}")
        if len(self._blocks) >= self.LIMIT:
            values = (OTHER,) * len(values)
        start = UNSET_BYTES + _ZERO_BYTES * (self._column.shape.width - 1)
        block = self._blocks.setdefault(values, Block(bytearray(start)))
        return self.setdefault(values if len(values) != 1 else values[0], self._column.make(block, 0, -1))

    def family(self, start_time: float) -> MetricFamily:
        """A snapshot. Its shape is made anew each time: these are few, and change."""
        definition, blocks = self._column.definition, dict(self._blocks)
        shape = Shape(
            name=definition.name,
            type=definition.type,
            help=definition.help,
            unit=definition.unit,
            label_names=tuple(label.name for label in definition.labels),
            combos=tuple(blocks),
            bounds=definition.bounds,
            per_actor=False,
            across=definition.across,
        )
        values = memoryview(gather(tuple(blocks.values()), 0, shape.width)).cast("d")
        return MetricFamily(shape, ("",), values, (start_time,))
