"""From a method's name and settings to its transform; how settings of a recipe and of a command line combine."""

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from entropy_polarity.controllers import CONTROLLERS
from entropy_polarity.methods.builders import controller_of, make_controller, parameters_of
from entropy_polarity.methods.table import METHODS
from entropy_polarity.support.errors import check_settings, unknown_name

if TYPE_CHECKING:
    from entropy_polarity.transforms import Transform

# Methods whose name meant another rule in results that are older than the date.
RENAMED = {"opefo": ("opefo_polarity", "2026-11-28")}


def name_of(name: str, date: str) -> str:
    """Today's name of what was called `name` on an ISO date.

    >>> name_of("opefo", "2026-11-23T20:19:45+00:00"), name_of("grpo", "2026-11-23")
    ('opefo_polarity', 'grpo')
    """
    now, until = RENAMED.get(name, (name, ""))
    return now if date < until else name


def chain_name(name: Any) -> Any:
    """A list of methods as the name of their chain; a name as it is.

    >>> chain_name(["dapo", "papo"])
    'dapo+papo'
    """
    return "+".join(map(str, name)) if isinstance(name, list | tuple) else name


def make_transform(name: str | Sequence[str], settings: Mapping[str, Any] | None = None) -> "Transform":
    """The transform of the method `name`, or of a chain: "dapo+papo" or ["dapo", "papo"] is first one, then the other.

    In a chain a setting goes to the method that takes it, or stands in a table of that method's name. Raises ValueError
    for names and settings that are unknown, missing or of the wrong type, and for methods that do not go together.

    >>> make_transform("papo", {"controller": "balance"}).decides_from
    'whole batch'
    >>> make_transform("dapo+papo", {"level": 0.3, "dapo": {"clip_high": 0.3}}).loss.clip_high
    0.3
    """
    parts = _parts(name, settings or {})
    _check_parts(parts)
    return _built(parts)


def check_method(name: str | Sequence[str], settings: Mapping[str, Any] | None = None) -> None:
    """Raise as `make_transform`, for names, types and what is missing, and for all that PAPO's controllers check.

    Torch is loaded only for a chain, and for settings of a method in `transforms`, or values missing from it.
    """
    parts = _parts(name, settings or {})
    _check_parts(parts)
    if len(parts) > 1:
        _built(parts)


def check_name(name: Any) -> list[str]:
    """The methods of a name or a chain. Raises ValueError for one that is not in the table, or there twice."""
    names = chain_name(name).split("+") if isinstance(name, str | list | tuple) else [name]
    for one in names:
        if not isinstance(one, str) or one not in METHODS:
            raise unknown_name("method", one or name, METHODS)
    if len(set(names)) < len(names):
        raise ValueError(f"method {chain_name(name)!r} names a method twice; a chain has each once")
    return names


def _built(parts: Mapping[str, Mapping[str, Any]]) -> "Transform":
    transforms = [METHODS[name].build(**settings) for name, settings in parts.items()]
    if len(transforms) == 1:
        return transforms[0]
    from entropy_polarity.transforms import chain

    try:
        return chain(*transforms)
    except ValueError as error:
        raise ValueError(f"methods {' and '.join(parts)} do not go together: {error}") from None


def _parts(name: Any, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each method of a name or a chain, with its own settings."""
    names = check_name(name)
    if len(names) == 1:
        return {names[0]: dict(settings)}
    parts: dict[str, dict[str, Any]] = {one: {} for one in names}
    for key, value in settings.items():
        if key in parts and isinstance(value, Mapping):
            parts[key] |= value
            continue
        takers = [one for one in names if key in _settings_of(one)]
        if not takers:
            known = [setting for one in names for setting in _settings_of(one)]
            raise unknown_name(f"setting of method {chain_name(name)!r}", key, known)
        if len(takers) > 1:
            raise ValueError(
                f"setting {key!r} of method {chain_name(name)!r} is one of {' and of '.join(takers)}: write it as "
                f"{takers[-1]}.{key}"
            )
        parts[takers[0]][key] = value
    return parts


def _settings_of(name: str) -> set[str]:
    """What a method takes, with any of its controllers."""
    method = METHODS[name]
    builders = (method.build, *method.controllers.values())
    return {setting for build in builders for setting in parameters_of(build)}


def _check_parts(parts: Mapping[str, Mapping[str, Any]]) -> None:
    for name, settings in parts.items():
        method = METHODS[name]
        if not settings and not method.example:
            continue
        parameters = parameters_of(method.build)
        own = {key: value for key, value in settings.items() if key in parameters or not method.controllers}
        check_settings(f"method {name!r}", method.build, own)
        missing = [key for key, p in parameters.items() if p.default is Parameter.empty and key not in settings]
        if missing:
            raise ValueError(
                f"method {name!r} needs a value for {', '.join(missing)} (no published one is known): "
                f"--set method.{missing[0]}=... or method_settings={{{missing[0]!r}: ...}}"
            )
        if method.controllers:
            make_controller(controller_of(settings), {key: settings[key] for key in settings if key not in own})


def given_beside(
    table: Mapping[str, Any], given: Mapping[str, Any], say: Callable[[str], None], owner: str = "method"
) -> dict[str, Any]:
    """The method `table` of a recipe (its name, its settings) with what is `given` beside its name.

    What is given changes that alone. But another name takes nothing of the table along; another controller no setting
    of the one before, and `say` gets a line that names them; of `level` and `fraction`, which exclude each other, the
    given one stays, and `every` goes with sign_from "exact". `owner` is what the line calls the table. Raises
    ValueError for a name that is no method's.
    """
    name = chain_name(given.get("name", table.get("name")))
    names = check_name(name)
    own, beside = ({key: value for key, value in x.items() if key != "name"} for x in (table, given))
    if name != chain_name(table.get("name")):
        return {"name": name, **beside}
    if len(names) == 1:
        return {"name": name, **_beside(name, own, beside, say, owner)}
    parts, others = _parts(name, own), _parts(name, beside)
    made = {one: _beside(one, parts[one], others[one], say, owner) for one in names}
    return {"name": name, **{one: settings for one, settings in made.items() if settings}}


def _beside(
    name: str, own: Mapping[str, Any], given: Mapping[str, Any], say: Callable[[str], None], owner: str
) -> dict[str, Any]:
    """The settings of one method with what is given beside them."""
    dropped: set[str] = set()
    if METHODS[name].controllers:
        before, after = controller_of(own), controller_of({**own, **given})
        if after != before:
            dropped = {key for build in CONTROLLERS.values() for key in parameters_of(build)}
        if lost := [f"{key}={value!r}" for key, value in own.items() if key in dropped and key not in given]:
            verb = "is" if len(lost) == 1 else "are"
            say(
                f"{owner}.controller={after}: the recipe's {', '.join(lost)} belonged to controller {before!r} and "
                f"{verb} dropped"
            )
        dropped |= {other for one, other in (("level", "fraction"), ("fraction", "level")) if one in given}
        dropped |= {"every"} if given.get("sign_from", "exact") != "exact" else set()
    return {key: value for key, value in own.items() if key not in dropped} | dict(given)
