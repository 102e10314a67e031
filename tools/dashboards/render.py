"""Turn a board into the JSON that Grafana imports and provisions alike, with the types of Grafana's SDK.

Three things are put right after the SDK. It says schema 42; we say 39, which older versions of Grafana know too, and
which newer ones raise when they load a file (docs/decisions/0054). It moves links and annotations into a menu of their
own (`placement`). And it leaves out `current` of a variable, which Grafana itself always writes; an empty one pins
nothing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rkmetrics.catalogue.exporter import Exporter
from rkmetrics.catalogue.runtime import Process
from tools.dashboards.base import Board, Panel, Query, Row
from tools.dashboards.queries import TARGET, ours, series

with warnings.catch_warnings():  # the SDK would rather have v2, which no provisioning file can hold as it is
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import (
        common,
        dashboard,
        gauge,
        heatmap,
        prometheus,
        stat,
        statetimeline,
        table,
        timeseries,
    )

__all__ = ["SCHEMA_VERSION", "rendered"]

SCHEMA_VERSION = 39
COLUMNS = 24
SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")


def rendered(board: Board) -> str:
    """Return the text of a dashboard's file."""
    return json.dumps(_mended(_plain(_dashboard(board))), indent=2, ensure_ascii=False) + "\n"


def _plain(model: object) -> Any:
    return json.loads(json.dumps(model, cls=JSONEncoder))


def _mended(found: dict[str, Any]) -> dict[str, Any]:
    """What the head of this module says."""
    found["schemaVersion"] = SCHEMA_VERSION
    for each in (*found["links"], *found["annotations"]["list"]):
        del each["placement"]
    for variable in found["templating"]["list"]:
        variable["current"] = {}
    return found


def _dashboard(board: Board) -> dashboard.Dashboard:
    return dashboard.Dashboard(
        uid=f"rkmetrics-{board.name}",
        title=f"rkmetrics / {board.title}",
        description=board.about,
        tags=["rkmetrics"],
        timezone="",
        editable=False,
        graph_tooltip=dashboard.DashboardCursorSync.CROSSHAIR,
        time=dashboard.DashboardDashboardTime(from_val="now-1h", to="now"),
        refresh="30s",
        version=1,
        panels=[*_numbered(_placed(board.rows))],
        templating=dashboard.DashboardDashboardTemplating(list_val=[*_variables(board)]),
        annotations=dashboard.AnnotationContainer(list_val=[_restarts()]),
        links=[_link()],
    )


def _link() -> dashboard.DashboardLink:
    return dashboard.DashboardLink(
        title="rkmetrics",
        type_val=dashboard.DashboardLinkType.DASHBOARDS,
        tags=["rkmetrics"],
        icon="external link",
        url="",
        as_dropdown=True,
        include_vars=True,
        keep_time=True,
    )


def _restarts() -> dashboard.AnnotationQuery:
    """A mark at each start of a process, at the time that the series holds."""
    return dashboard.AnnotationQuery(
        name="Process starts",
        datasource=SOURCE,
        icon_color="blue",
        expr=f"{ours(series(Process.started))} * 1000",
        title_format="started",
        text_format="{{instance}}",
        tag_keys="job",
        use_value_for_time=True,
    )


# --- variables --------------------------------------------------------------------------------------------------------


def _variables(board: Board) -> Iterator[dashboard.VariableModel]:
    """The data source, then what Prometheus knows: from the one series that every target has."""
    yield dashboard.VariableModel(
        type_val=dashboard.VariableType.DATASOURCE,
        name="datasource",
        label="Data source",
        query="prometheus",
        refresh=dashboard.VariableRefresh.ON_DASHBOARD_LOAD,
        **_COMMON,
    )
    known = Exporter.build_info.definition.name
    yield _variable("job", "Job", f"label_values({known}, job)")
    yield _variable("instance", "Instance", f'label_values({known}{{job=~"$job"}}, instance)')
    if board.actors:
        yield _variable("actor_name", board.actors_label, f"label_values({_counters(board)}, actor_name)")


def _counters(board: Board) -> str:
    first, *others = (each.name for each in board.actors)
    if others:
        return f'{{__name__=~"{"|".join((first, *others))}", {TARGET}}}'
    return f"{first}{{{TARGET}}}"


# Settings of other kinds of variables, which the SDK writes unless they are taken out.
_COMMON: Mapping[str, Any] = {
    "auto": None,
    "auto_min": None,
    "auto_count": None,
    "allow_custom_value": None,
    "hide": dashboard.VariableHide.DONT_HIDE,
    "options": [],
    "regex": "",
}


def _variable(name: str, label: str, query: str) -> dashboard.VariableModel:
    return dashboard.VariableModel(
        type_val=dashboard.VariableType.QUERY,
        name=name,
        label=label,
        datasource=SOURCE,
        definition=query,
        query={"query": query, "refId": f"variable-{name}"},
        multi=True,
        include_all=True,
        all_value=".+",
        refresh=dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED,
        sort=dashboard.VariableSort.ALPHABETICAL_ASC,
        **_COMMON,
    )


# --- panels -----------------------------------------------------------------------------------------------------------


def _placed(rows: tuple[Row, ...]) -> Iterator[dashboard.Panel | dashboard.RowPanel]:
    """Panels from left to right, and below each other where a line is full."""
    y = 0
    for row in rows:
        yield dashboard.RowPanel(title=row.title, grid_pos=dashboard.GridPos(h=1, w=COLUMNS, x=0, y=y), panels=[])
        y, x, height = y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                y, x, height = y + height, 0, 0
            made = _panel(panel)
            made.grid_pos = dashboard.GridPos(h=panel.height, w=panel.width, x=x, y=y)
            x, height = x + panel.width, max(height, panel.height)
            yield made
        y += height


def _numbered(
    panels: Iterator[dashboard.Panel | dashboard.RowPanel],
) -> Iterator[dashboard.Panel | dashboard.RowPanel]:
    for number, panel in enumerate(panels, 1):
        panel.id_val = number
        yield panel


def _panel(panel: Panel) -> dashboard.Panel:
    kind = KINDS[panel.kind]
    return dashboard.Panel(
        type_val=panel.kind,
        title=panel.title,
        description=panel.about,
        datasource=SOURCE,
        targets=[_target(kind, ref, query) for ref, query in zip("ABCDEFGH", panel.queries, strict=False)],
        field_config=dashboard.FieldConfigSource(defaults=_defaults(kind, panel), overrides=[]),
        options=kind.options(panel),
        transformations=[*kind.transformations(panel)] or None,
        transparent=None,
    )


def _target(kind: Kind, ref: str, query: Query) -> prometheus.Dataquery:
    return prometheus.Dataquery(
        ref_id=ref,
        datasource=SOURCE,
        expr=query.expr,
        legend_format=query.legend,
        editor_mode=prometheus.QueryEditorMode.CODE,
        format_val=kind.format,
        instant=kind.instant or None,
        range_val=not kind.instant,
    )


def _defaults(kind: Kind, panel: Panel) -> dashboard.FieldConfig:
    steps = [dashboard.Threshold(value=value, color=colour) for value, colour in ((None, panel.base), *panel.steps)]
    return dashboard.FieldConfig(
        unit=panel.unit,
        color=dashboard.FieldColor(mode=kind.colours),
        min_val=panel.low,
        max_val=panel.high,
        no_value=panel.no_value or None,
        mappings=[_words(panel)] if panel.values else None,
        thresholds=dashboard.ThresholdsConfig(mode=dashboard.ThresholdsMode.ABSOLUTE, steps=steps),
        custom=kind.custom() if kind.custom else None,
    )


def _words(panel: Panel) -> dashboard.ValueMap:
    return dashboard.ValueMap(
        options={
            number: dashboard.ValueMappingResult(text=word, color=colour, index=index)
            for index, (number, word, colour) in enumerate(panel.values)
        }
    )


# --- what is particular to each kind of panel -------------------------------------------------------------------------


def _none(panel: Panel) -> Iterator[dashboard.DataTransformerConfig]:
    yield from ()


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of panel is drawn. instant: whether it asks for what holds at the end of the time on the screen.

    A number has to: the last one of a range is that of a process which may be gone for long.
    """

    options: Callable[[Panel], object]
    colours: dashboard.FieldColorModeId = dashboard.FieldColorModeId.PALETTE_CLASSIC
    custom: Callable[[], object] | None = None
    format: prometheus.PromQueryFormat | None = None
    instant: bool = False
    transformations: Callable[[Panel], Iterator[dashboard.DataTransformerConfig]] = _none


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions(calcs=["lastNotNull"], fields="", values=False)


def _number(panel: Panel) -> stat.Options:
    names = common.BigValueTextMode.VALUE_AND_NAME if panel.names else common.BigValueTextMode.VALUE
    return stat.Options(graph_mode=common.BigValueGraphMode.NONE, text_mode=names, reduce_options=_last())


def _gauge(panel: Panel) -> gauge.Options:
    return gauge.Options(reduce_options=_last())


def _plot(panel: Panel) -> timeseries.Options:
    legend = common.VizLegendOptions(
        display_mode=common.LegendDisplayMode.TABLE,
        placement=common.LegendPlacement.BOTTOM,
        show_legend=True,
        calcs=["lastNotNull", "max"],
        sort_by="Last *",
        sort_desc=True,
    )
    tooltip = common.VizTooltipOptions(mode=common.TooltipDisplayMode.MULTI, sort=common.SortOrder.DESCENDING)
    return timeseries.Options(legend=legend, tooltip=tooltip)


def _drawn() -> timeseries.FieldConfig:
    return timeseries.FieldConfig(
        draw_style=common.GraphDrawStyle.LINE,
        line_width=1,
        fill_opacity=10,
        show_points=common.VisibilityMode.NEVER,
        span_nulls=False,
    )


def _heat(panel: Panel) -> heatmap.Options:
    """The server has the buckets: nothing is calculated."""
    return heatmap.Options(
        calculate=False,
        y_axis=heatmap.YAxisConfig(unit=panel.unit, axis_placement=common.AxisPlacement.LEFT),
        rows_frame=heatmap.RowsHeatmapOptions(layout=common.HeatmapCellLayout.AUTO),
    )


def _timeline(panel: Panel) -> statetimeline.Options:
    legend = common.VizLegendOptions(
        display_mode=common.LegendDisplayMode.LIST, placement=common.LegendPlacement.BOTTOM, show_legend=True, calcs=[]
    )
    return statetimeline.Options(show_value=common.VisibilityMode.NEVER, legend=legend)


def _bars() -> statetimeline.FieldConfig:
    return statetimeline.FieldConfig(line_width=0, fill_opacity=70)


def _table(panel: Panel) -> table.Options:
    return table.Options()


def _columns(panel: Panel) -> Iterator[dashboard.DataTransformerConfig]:
    """One line for each series, with a column for each query that is called by its legend."""
    several = len(panel.queries) > 1
    names = {
        f"Value #{ref}" if several else "Value": query.legend
        for ref, query in zip("ABCDEFGH", panel.queries, strict=False)
    }
    yield dashboard.DataTransformerConfig(id_val="merge", options={})
    yield dashboard.DataTransformerConfig(
        id_val="organize", options={"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": names}
    )


KINDS: Mapping[str, Kind] = {
    "stat": Kind(_number, dashboard.FieldColorModeId.THRESHOLDS, instant=True),
    "gauge": Kind(_gauge, dashboard.FieldColorModeId.THRESHOLDS, instant=True),
    "timeseries": Kind(_plot, custom=_drawn),
    "heatmap": Kind(_heat, custom=heatmap.FieldConfig, format=prometheus.PromQueryFormat.HEATMAP),
    "state-timeline": Kind(_timeline, dashboard.FieldColorModeId.THRESHOLDS, custom=_bars),
    "table": Kind(
        _table,
        custom=common.TableFieldOptions,
        format=prometheus.PromQueryFormat.TABLE,
        instant=True,
        transformations=_columns,
    ),
}
