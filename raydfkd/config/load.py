"""Recipes as YAML: packaged ones and files, what they extend, overrides, ${variables} and ``~``."""

from __future__ import annotations

import json
import os
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raydfkd.config.describe import model_in
from raydfkd.config.recipe import Recipe
from raydfkd.config.registry import explain, keys_of
from raydfkd.config.schema import LIBRARIES, TeacherSpec, TransferSetSpec
from raydfkd.errors import MissingError, RecipeError, did_you_mean, read_text
from raydfkd.report.redaction import is_redacted, redacted_at, redacted_setting

PLACES = (
    *("run_dir", "teacher.weights", "teacher.class_names", "verifier.weights", "transfer_set.uri"),
    *("synthesis.start.images", "synthesis.statistics", "synthesis.embeddings"),
)
"""Keys of files and folders, beside options of real data.

A local one is kept as a path, which means the same to driver, workers and libraries.
"""
RECIPES = Path(__file__).parents[1] / "recipes"
"""Recipes that come with raydfkd; in ``jobs`` those that also say where they run, in ``methods`` those for any teacher,
in ``parts`` what several of them have in common, in ``zoo`` teachers that methods have to hold for.
"""
GLUED = re.compile(r"[{,\s]*\w+:[^\s:/]")
"""A key without a space after its colon."""
COMMON = "student_training"
"""Name of the part that all methods have in common: how a student is trained."""


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with raydfkd."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def packaged_jobs() -> list[str]:
    """Names of the jobs that come with raydfkd: recipes that also say on what they run, the files of ``jobs/``."""
    return sorted(path.stem for path in (RECIPES / "jobs").glob("*.yaml"))


def packaged_methods() -> list[str]:
    """Names of the methods that come with raydfkd: recipes without a teacher, to start one's own from."""
    return sorted(path.stem for path in (RECIPES / "methods").glob("*.yaml"))


def page_data(name: str) -> dict[str, Any]:
    """The sections of a packaged page, a recipe, job or method, with those of the pages that it starts from."""
    path = packaged_path(name)
    assert path is not None, "it is a packaged one"
    return _read(path, name, seen=())


def method_of(source: str) -> dict[str, Any]:
    """The sections of a packaged method, a recipe or a file that say how images are made and learned from.

    Of a packaged method without those that all methods have in common.
    """
    data = _read(_locate(source, packaged_methods()), source, seen=(), without=COMMON)
    return {key: data[key] for key in ("synthesis", "distill", "rounds", "transfer_set", "budget") if key in data}


def load_with_method(
    source: str, method: str, overrides: Sequence[str] = (), run_dir: str | Path | None = None
) -> Recipe:
    """The recipe ``source`` with another method in the place of its own, on equal terms.

    Teacher, student, real data and the numbers of images and steps are the recipe's, and so are arithmetic, optimiser,
    batch size and augmentation of the student; the method's are synthesis, criterion, source of batches and rounds, and
    whatever else it says by itself.

    Args:
        source: recipe, a file or the name of a packaged one.
        method: name of a packaged method, or a recipe of which only the method counts.
        overrides: changes to the whole, as ``load_recipe`` has them.
        run_dir: replaces the recipe's.

    Raises:
        RecipeError: as ``load_recipe``.
    """
    base, own = _read(_locate(source), source, seen=()), method_of(method)
    common = _read(RECIPES / "parts" / f"{COMMON}.yaml", COMMON, seen=())
    how = {key: value for key, value in base.get("synthesis", {}).items() if key in ("precision", "compile", "threads")}
    learns = {key: value for key, value in base.get("distill", {}).items() if key not in ("criterion", "source")}
    distill = _merge(_merge(common["distill"], learns), own.get("distill", {}))
    data: dict[str, Any] = {
        **{key: value for key, value in base.items() if key not in ("rounds", "budget")},
        "name": f"{base.get('name', 'recipe')}-{Path(method).stem}",
        "synthesis": {**how, **own.get("synthesis", {})},
        "distill": distill,
        "transfer_set": _merge(base.get("transfer_set", {}), own.get("transfer_set", {})),
        **{key: own[key] for key in ("rounds", "budget") if key in own},
    }
    _share_out(data["transfer_set"], data.get("rounds", 1))
    return _resolved(data, f"{source} with {method}", overrides, run_dir, is_trusted=True)


def _share_out(spec: dict[str, Any], rounds: int) -> None:
    """Make the images of each class as many as fill units that can be shared out among the rounds."""
    unit, images = spec.get("unit", {}).get("images_per_class", 1), spec.get("images_per_class", 0)
    if images and images % (unit * rounds):
        spec["images_per_class"] = unit * rounds * max(1, round(images / (unit * rounds)))


def packaged_path(name: str) -> Path | None:
    """The file of a packaged recipe, job or method; None where there is none of that name."""
    groups = ("jobs", "methods", "parts", "zoo")
    paths = (RECIPES / f"{name}.yaml", *(RECIPES / group / f"{name}.yaml" for group in groups))
    return next((path for path in paths if re.fullmatch(r"[\w.-]+", name) and path.is_file()), None)


def load_recipe(
    source: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    run_dir: str | Path | None = None,
    *,
    is_trusted: bool = True,
) -> Recipe:
    """Read a recipe from a file or by the name of a packaged one.

    A recipe may start from another: ``recipe: NAME`` takes everything from that one and replaces what is given.
    ``overrides`` are ``a.b.c=value`` with YAML values, or a mapping of ``a.b.c`` to plain data; an entry of a list is
    addressed by its name or position. Paths that begin with ``~`` are expanded here, once, and ``file://`` goes. What
    is missing of a teacher or verifier that a library has by name is filled in from the library, which is imported for
    it.

    Args:
        source: file or name.
        overrides: changes; ``scale=NAME`` is one of the recipe's ``scales``, and comes before all others.
        run_dir: replaces the recipe's.
        is_trusted: whether files and hubs that the recipe names may be opened.

    Raises:
        RecipeError: with the key, its value and the remedy, a line for each mistake.
    """
    data = _read(_locate(str(source)), str(source), seen=())
    if "teacher" not in data and str(source) in packaged_methods():
        raise RecipeError(
            f"{source} is a method, for any teacher; `raydfkd init` writes a recipe for yours, or begin one with "
            f"`recipe: {source}`"
        )
    return _resolved(data, str(source), overrides, run_dir, is_trusted=is_trusted)


def _resolved(
    data: dict[str, Any],
    source: str,
    overrides: Sequence[str] | Mapping[str, Any],
    run_dir: str | Path | None,
    *,
    is_trusted: bool,
) -> Recipe:
    """The recipe that ``data`` are, with changes to them and what libraries know filled in."""
    changes = list(_changes(overrides))
    data = _scaled(data, source, [value for path, value, _ in changes if path == "scale"])
    for path, value, said in changes:
        if path != "scale":
            _override(data, path, value, said)
    if run_dir is not None:
        data["run_dir"] = str(run_dir)
    _fill_in(data, is_trusted=is_trusted)
    _expand(data)
    try:
        recipe = Recipe.model_validate_json(json.dumps(data))
    except TypeError as error:
        raise RecipeError(f"{source} has a value that is not plain data: {error}") from None
    except ValidationError as error:
        raise RecipeError(*explain(error, "", Recipe, elsewhere=[*keys_of(Recipe), *_written(data)])) from None
    lost = [
        f"{key} is {text!r}, because a saved recipe has no secrets; give it again, as with --set {key}=..."
        for key, text in _texts(data)
        if is_redacted(text)
    ]
    if lost:
        raise RecipeError(*lost)
    return recipe


def _scaled(data: dict[str, Any], source: str, chosen: Sequence[Any]) -> dict[str, Any]:
    """``data`` at the last of the scales that were ``chosen``, else at the one that it names; in full without any.

    A recipe's ``scales`` are changes to it under a name each: the same path with other numbers.
    """
    scales, written = data.pop("scales", {}), data.pop("scale", None)
    scale = [written, *chosen][-1]
    if scale is None:
        return data
    if not isinstance(scales, dict) or scale not in scales:
        known = did_you_mean(str(scale), list(scales)) if scales else f"{source} has no scales; drop it"
        raise RecipeError(f"scale is {scale!r}; {known}")
    return _merge(data, scales[scale])


def expand_home(path: str) -> str:
    """The path with ``~/`` and ``~user/`` replaced by the folder that they stand for; other text as it is."""
    scheme = re.match(r"(?:file|local)://(?=~)", path)
    rest = path.removeprefix(scheme[0] if scheme else "")
    if rest != "~" and not re.match(r"~[\w.-]*/", rest):
        return path
    return (scheme[0] if scheme else "") + os.path.expanduser(rest)


def _locate(source: str, others: Sequence[str] = ()) -> Path:
    """The file of a recipe, by its path or its name, which may be one of ``others`` too."""
    path = Path(expand_home(source))
    if path.is_file():
        return path
    packaged = packaged_path(source)
    if packaged is not None:
        return packaged
    names = [*packaged_recipes(), *packaged_jobs(), *others]
    if path.suffix in (".yaml", ".yml") or "/" in source:
        if path.stem in names:
            raise RecipeError(f"{source}: no such file; `{path.stem}` alone is the one that comes with raydfkd")
        raise RecipeError(f"{source}: no such file; give a recipe file or one of: {', '.join(names)}")
    raise RecipeError(f"{source}: no such recipe; {did_you_mean(source, names)}")


def _read(path: Path, source: str, seen: tuple[str, ...], without: str | None = None) -> dict[str, Any]:
    """The data of a recipe with those of the recipes that it starts from, but for the one called ``without``."""
    if source in seen:
        raise RecipeError(f"recipe: {' -> '.join((*seen, source))} goes in a circle; name another base")
    try:
        data = yaml_value(read_text(path, f"{path} cannot be read as a recipe"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{source} is not a recipe: the top of the file must be keys like `teacher:`")
    base = data.pop("recipe", None)
    if base is None or base == without:
        return data
    beside = path.parent / expand_home(str(base))
    packaged = packaged_path(str(base)) if RECIPES in path.parents else None
    if beside.is_file():
        return _merge(_read(beside, str(beside), (*seen, source), without), data)
    return _merge(_read(packaged or _locate(str(base)), str(base), (*seen, source), without), data)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` in it: mappings merge, everything else is replaced.

    A mapping that names another plug-in replaces the old one whole, whose options would not suit it; another network
    has none of the old one's options.
    """
    if any(base.get(key, name) != name for key, name in changes.items() if key in ("kind", "synthesizer")):
        return changes
    merged = dict(base)
    if base.get("network") != changes.get("network", base.get("network")):
        merged.pop("options", None)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, dict) and isinstance(before, str) and not value.keys() & {"kind", "term"}:
            before = {"kind": before}
        merged[key] = _merge(before, value) if isinstance(value, dict) and isinstance(before, dict) else value
    return merged


def _changes(overrides: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yield the key and value of each override, and the text in which both were given, for messages."""
    if isinstance(overrides, Mapping):
        for path, value in overrides.items():
            yield path, _plain(value), f"override {path}"
        return
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set {redacted_setting(override)}: write it as key=value, such as seed=1")
        try:
            value = yaml_value(text)
        except yaml.YAMLError:
            said = redacted_setting(override)
            remedy = "write a space after each colon" if GLUED.match(text) else "quote it"
            raise RecipeError(f"--set {said}: {said.partition('=')[2]!r} is not a YAML value; {remedy}") from None
        except RecipeError as error:
            raise RecipeError(f"--set {redacted_setting(override)}: {error}") from None
        yield path, value, f"--set {redacted_setting(override)}"


def yaml_value(text: str) -> Any:
    """The value of a text of YAML as recipes are written.

    Raises:
        yaml.YAMLError: it is none.
        RecipeError: a key is given twice, or has no space after its colon, which would make both a name.
    """
    return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader


def _plain(value: Any) -> Any:
    """Data as YAML would give it, of a fresh mapping and list each, so that no caller's is changed."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _override(data: dict[str, Any], path: str, value: Any, said: str) -> None:
    """Put ``value`` at ``path``; sections on the way that are not written begin with their defaults."""
    place: Any = data
    model: type[BaseModel] | None = Recipe
    parts = path.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if isinstance(place, list):
            key: Any = _position(place, part, where, said)
        elif isinstance(place, dict):
            key = part
        else:
            raise RecipeError(f"{said}: {where} is {redacted_at(where, place)!r}, which has no keys inside")
        if depth == len(parts) - 1:
            place[key] = value
            return
        may_be_bare = isinstance(place, list)
        if isinstance(place, dict):
            may_be_bare = model is not None and _may_be_bare_name(model, part)
            place.setdefault(key, {} if model is None else _default_at(model, part))
            model = None if model is None else _model_at(model, part)
        if place[key] is None:
            place[key] = {}
        elif isinstance(place[key], str) and may_be_bare:
            place[key] = {"term" if "objective" in parts[:depth] else "kind": place[key]}
        place = place[key]


def _position(entries: list[Any], part: str, where: str, said: str) -> int:
    names = [_entry_name(entry, index) for index, entry in enumerate(entries)]
    if part.isdigit() and int(part) < len(entries):
        return int(part)
    if part not in names:
        raise RecipeError(f"{said}: {where} has no entry {part!r}; {did_you_mean(part, names)}")
    return names.index(part)


def _model_at(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    return model_in(model.model_fields[key].annotation) if key in model.model_fields else None


def _may_be_bare_name(model: type[BaseModel], key: str) -> bool:
    """Whether a plug-in may stand at ``key`` as a bare name: also where ``key`` is an option of another plug-in."""
    if key not in model.model_fields:
        return model.model_config.get("extra") == "allow"
    inner = _model_at(model, key)
    return inner is not None and "kind" in inner.model_fields


def _default_at(model: type[BaseModel], key: str) -> Any:
    """The value at ``key`` unless it is written."""
    field = model.model_fields.get(key)
    return {} if field is None or field.is_required() else _plain(field.default)


def _written(data: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Dotted keys of everything that is written."""
    for key, value in data.items():
        yield f"{where}{key}"
        if isinstance(value, dict):
            yield from _written(value, f"{where}{key}.")


def _texts(data: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of all texts, and these."""
    if isinstance(data, str):
        yield where, data
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield from _texts(value, f"{where}.{key}".lstrip("."))


def _entry_name(entry: Any, index: int) -> str:
    if isinstance(entry, dict):
        return str(entry.get("name") or entry.get("term") or entry.get("kind") or index)
    return str(entry)


def _fill_in(data: dict[str, Any], *, is_trusted: bool) -> None:
    """Make folders of networks absolute, and add what libraries know of teacher and verifier and nobody has given."""
    sections = {role: data[role] for role in ("teacher", "student", "verifier") if isinstance(data.get(role), dict)}
    sections = {role: section for role, section in sections.items() if isinstance(section.get("network"), str)}
    for section in sections.values():
        section["network"] = _absolute_network(section["network"])
    if "teacher" in sections:
        data["teacher"] = _filled_in(sections["teacher"], "teacher", is_trusted=is_trusted)
    if "verifier" in sections:
        data["verifier"] = _verifier(sections["verifier"], is_trusted=is_trusted)


def _verifier(section: Mapping[str, Any], *, is_trusted: bool) -> dict[str, Any]:
    """The section with what its library knows; where that is not there, the run does without, so that it may lack."""
    given = {key: value for key, value in section.items() if value is not None}  # as a recipe was saved that lacked it
    if given["network"].partition(":")[0] in LIBRARIES:
        given.setdefault("weights", "pretrained")
    try:
        found = _filled_in(given, "verifier", is_trusted=is_trusted)
    except MissingError:
        return {key: value for key, value in given.items() if key != "image_space" or _is_whole(value)}
    return {key: value for key, value in found.items() if key != "class_names" or key in given}


def _is_whole(space: Any) -> bool:
    return isinstance(space, dict) and space.keys() >= {"channels", "size", "mean", "std"}


def _filled_in(section: dict[str, Any], role: str, *, is_trusted: bool) -> dict[str, Any]:
    """The section of a trained network with what its library knows of it, where that is wanted."""
    family = section["network"].partition(":")[0]
    has_weights = "weights" in section or section.get("train") is not None
    is_known = _is_whole(section.get("image_space")) and "classes" in section and has_weights
    if family not in LIBRARIES or is_known:
        return section
    if family == "hf" and not is_trusted:
        raise RecipeError(
            f"{role}.network is {section['network']!r}, whose files are not opened with --no-code; "
            f"give {role}.classes, image_space and weights"
        )
    describe = pkgutil.resolve_name("raydfkd.networks.libraries:described")  # imports torch
    return _described(describe(section, role), section)


def _described(known: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """What is ``known`` of a network with what was given of it, which counts."""
    space, given = dict(known.get("image_space", {})), section.get("image_space") or {}
    if not isinstance(given, dict):
        return {**known, **section}
    if given.get("channels", space.get("channels")) != space.get("channels"):
        space = {"size": space.get("size")}  # constants for other channels are none
    names = known.get("class_names")
    if names is not None and section.get("classes", len(names)) != len(names):
        known = {key: value for key, value in known.items() if key != "class_names"}
    whole = {**space, **given}
    return {**known, **section, **({"image_space": whole} if whole else {})}


def _absolute_network(network: str) -> str:
    """A network that is a file or folder here with its whole path, which means the same to every process."""
    family, _, name = network.partition(":")
    place, *entry = name.rsplit(":", 1) if family == "torchhub" else (name,)
    path = Path(expand_home(place))
    if family not in ("hf", "torchhub", "torchscript", "export") or not path.exists():
        return network
    return ":".join([family, os.path.abspath(path), *entry])


def _expand(data: dict[str, Any]) -> None:
    """Put the run's name and folder where ``${name}`` and ``${run_dir}`` stand, and folders where ``~`` does."""
    values = {"name": str(data.get("name", ""))}

    def expand(value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {key: expand(inner, f"{where}.{key}".lstrip(".")) for key, inner in value.items()}
        if isinstance(value, list):
            return [expand(inner, f"{where}.{index}") for index, inner in enumerate(value)]
        if not isinstance(value, str):
            return value
        for name in re.findall(r"\$\{(\w+)\}", value):
            if name not in values:
                raise RecipeError(
                    f"{where} is {redacted_at(where, value)!r}: unknown placeholder; {did_you_mean(name, values)}"
                )
            value = value.replace(f"${{{name}}}", values[name])
        return expanded(value, where)

    def expanded(value: str, where: str) -> str:
        path = expand_home(value)
        if where not in PLACES and not where.startswith("real_data."):
            return path
        path = re.sub("^(file|local)://", "", path)
        if path.startswith("~"):
            raise RecipeError(
                f"{where} is {value!r}: there is no such home folder; write ~/ for yours, or ./~ for a name"
            )
        return path

    run_dir = data.setdefault("run_dir", Recipe.model_fields["run_dir"].default)
    if isinstance(run_dir, str):
        data["run_dir"] = expanded(run_dir.replace("${name}", values["name"]), "run_dir").rstrip("/")
    values["run_dir"] = str(data["run_dir"])
    for section, key in (("teacher", "weights"), ("transfer_set", "uri")):
        model = TeacherSpec if section == "teacher" else TransferSetSpec
        if isinstance(data.get(section), dict):
            data[section].setdefault(key, model.model_fields[key].default)
    data.update(expand(data, ""))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the same in C
    """Safe YAML in which 1e-4 is a number, a date is text, and a key given twice or glued to its value is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise RecipeError(f"{key.value}: given twice, again in line {line}; keep one of them")
            if isinstance(key, yaml.ScalarNode) and GLUED.match(key.value) and _is_left_out(value):
                name = key.value.partition(":")[0]  # what follows may be a secret
                raise RecipeError(f"{name}: no space after its colon; write one before the value")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _is_left_out(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.value and node.style not in ("'", '"')


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
