"""The networks of a config: their modules with projections, or what the caller hands over."""

from collections.abc import Iterable, Mapping
from typing import Any

from abkd_jax.checks import require
from abkd_jax.config.build import Builder
from abkd_jax.config.dry_run import hidden_width
from abkd_jax.config.plan import GIVEN, Network
from abkd_jax.data import Description
from abkd_jax.models import projected


def networks_of(
    config: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Any],
    builder: Builder,
    description: Description,
) -> dict[str, Network]:
    """The networks, their modules with the projections that they ask for.

    Args:
        config: of the run, as a plain dict.
        groups: of its networks, by name.
        given: {name: (apply_fn, variables)} that the caller hands over.
        builder: of groups.
        description: of the data.

    Returns:
        By name.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    for name, pair in given.items():
        expected = "(apply_fn, variables)"
        fits = isinstance(pair, tuple | list) and len(pair) == 2 and callable(pair[0])
        require(fits, f"networks[{name!r}]", expected, pair)
        if name not in groups:
            raise ValueError(
                f"networks has {name!r}, which the config lacks; add "
                f"{name}=dict(model=dict(fn='given'))."
            )
    built = {}
    for name, group in groups.items():
        if (group["model"] == GIVEN) != (name in given):
            raise ValueError(
                f"{name}.model must be dict(fn='given') exactly if networks= has {name!r}; found "
                f"{group['model']!r}."
            )
        module = weights = None
        if name not in given:
            model = builder.bound(group["model"], "model", f"{name}.model")
            try:
                module = model(num_classes=description.num_classes)
            except ValueError as error:
                raise ValueError(f"{name}.model: {error}") from None
        if group.get("weights"):
            weights = builder.bound(group["weights"], "weights", f"{name}.weights")
        seed = group.get("init_seed", config["init_seed"])
        built[name] = Network(module, given.get(name), weights, seed)
    plain = dict(built)
    for name, group in groups.items():
        if group.get("project") is not None:
            width = _projected_width(name, group["project"], plain, description)
            if width is not None:
                module = projected(built[name].module, hidden=width)
                built[name] = built[name]._replace(module=module)
    return built


def _projected_width(
    name: str,
    project: Any,
    networks: Mapping[str, Network],
    description: Description,
) -> int | None:
    """The width to project a network's features to; None where they have it already."""
    if networks[name].given or networks[name].weights:
        found = "given" if networks[name].given else "with weights"
        raise ValueError(
            f"{name}.project is for a network of the library with new parameters; found {name} "
            f"{found}."
        )
    width = project.get("hidden") if isinstance(project, Mapping) and len(project) == 1 else None
    named = isinstance(width, str)
    if not (width in networks and width != name if named else type(width) is int and width >= 1):
        raise ValueError(
            f"{name}.project must be dict(hidden=WIDTH), with the width of the other network's "
            f"features, or dict(hidden=NAME), with its name; found {project!r}."
        )
    own = hidden_width(name, networks[name], description)
    other = hidden_width(width, networks[width], description) if named else width
    for network, found, use in ((name, own, "project"), (width, other, "project to")):
        if found is None:
            raise ValueError(
                f"{name}.project: the model of {network!r} does not give 'hidden', the features to "
                f"{use}."
            )
    return None if named and other == own else other


def check_twins(networks: Mapping[str, Network], learners: Iterable[str]) -> None:
    """Refuses networks that would learn together and start as one and the same."""
    begun = {}
    for name in learners:
        start = (networks[name].module, networks[name].init_seed)
        if start in begun:
            raise ValueError(
                f"{name} and {begun[start]} are the same model with the same init_seed, "
                f"{start[1]}, so that they would start as one; give one of them its own: "
                f"{name}.init_seed={start[1] + 1}."
            )
        begun[start] = name
