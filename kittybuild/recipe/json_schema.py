"""The shape of recipes as a JSON schema, for editors: keys with what they mean, methods with their parameters.

It is made of the forms that check a recipe (recipe.schema), and of the methods that there are. A recipe that parses is
valid; what only its meaning tells (a method's own parameters, references, filters) is checked by the parser alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from kittybuild.model.method import Catalogue, Method, Param
from kittybuild.recipe.meanings import meaning
from kittybuild.recipe.schema import STAGE_KINDS, MergeText, MoeText, RecipeText
from kittybuild.tensors import DType

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TEXT = "Text"
_PARAMETERS = "Parameters"
_ANY_NUMBER = ("number", "string")  # YAML reads 1e-4 as text
Schema = dict[str, Any]


def json_schema(catalogue: Catalogue) -> Schema:
    """The schema of recipes: ours, bare mergekit configurations and mergekit-moe's."""
    forms = (RecipeText, MergeText, MoeText, *STAGE_KINDS.values())
    _, found = models_json_schema(
        [(form, "validation") for form in dict.fromkeys(forms)], ref_template="#/$defs/{model}"
    )
    forms_by_name: Schema = found["$defs"]
    defs = {name.removesuffix(_TEXT): _form(name.removesuffix(_TEXT), form) for name, form in forms_by_name.items()}
    defs |= {"Stage": _stage(), _PARAMETERS: _parameters(catalogue), "Method": _methods(catalogue)}
    stages = defs["Recipe"]["properties"]["stages"]
    stages["patternProperties"] = dict.fromkeys(stages["patternProperties"], _ref("Stage"))
    for form in defs.values():
        _name_words(form.get("properties", {}), catalogue)
    return {
        "$schema": DRAFT,
        "title": "kittybuild recipe",
        "description": "A recipe of kittybuild, or a configuration of mergekit or mergekit-moe.",
        "type": "object",
        **_chosen([("kittybuild", None, "Recipe"), ("experts", None, "Moe")], "Stage"),
        "$defs": {name: defs[name] for name in sorted(defs)},
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _chosen(ways: Sequence[tuple[str, str | None, str]], otherwise: str) -> Schema:
    """The form of the first key that is there (with that value, if one is given): so an editor tells of one form."""
    (key, value, form), *rest = ways
    there: Schema = {"required": [key]} | ({"properties": {key: {"const": value}}} if value else {})
    return {"if": there, "then": _ref(form), "else": _chosen(rest, otherwise) if rest else _ref(otherwise)}


def _stage() -> Schema:
    ways = [("kind", kind, form.__name__.removesuffix(_TEXT)) for kind, form in STAGE_KINDS.items() if kind != "merge"]
    kinds = {"kind": {"enum": list(STAGE_KINDS), "description": meaning("Stage", "kind")}}
    return {"type": "object", "properties": kinds, **_chosen(ways, "Merge")}


def _form(name: str, form: Schema) -> Schema:
    """A form as pydantic gives it, without its titles, with what its keys mean."""
    properties = {key: _plain(value) for key, value in form["properties"].items()}
    for key, value in properties.items():
        value["description"] = meaning(name, key)
        if key == "parameters":
            value["anyOf"] = [_ref(_PARAMETERS), {"type": "null"}]
        if key == "rank":  # a number alone is `most`
            value["anyOf"] = [
                {"type": "integer", "minimum": 1},
                *value.pop("anyOf", [{"$ref": value.pop("$ref", None)}]),
            ]
    return {**form, "title": name, "properties": properties}


def _plain(value: Any) -> Any:
    """A part of a schema without the titles that only repeat keys, and with the names of forms as they are here."""
    if isinstance(value, Mapping):
        kept = {key: _plain(item) for key, item in value.items() if key != "title" or not isinstance(item, str)}
        if isinstance(kept.get("$ref"), str):
            kept["$ref"] = kept["$ref"].removesuffix(_TEXT)
        return kept
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _name_words(properties: Schema, catalogue: Catalogue) -> None:
    """Name the words that the parser knows: methods, classes of arithmetic, dtypes."""
    dtypes = [dtype.torch_name for dtype in DType if dtype.is_float]
    words = {
        "merge_method": _ref("Method"),
        "numerics": {"enum": list(catalogue)},
        "dtype": {"enum": [*dtypes, *(f"torch.{name}" for name in dtypes)]},
    }
    words["out_dtype"] = words["dtype"]
    for key in properties.keys() & words.keys():
        kinds = [words[key], {"type": "null"}] if "anyOf" in properties[key] else [words[key]]
        properties[key] = {"anyOf": kinds, "description": properties[key].get("description")}


def _methods(catalogue: Catalogue) -> Schema:
    found: dict[str, Method] = {}
    for methods in catalogue.values():
        for method in methods:
            found.setdefault(method.name, method)
    told = [
        {"const": name, "title": method.title, "description": f"{method.doc} Takes {method.counts_text()}.".strip()}
        for name, method in found.items()
    ]
    return {"anyOf": told}


def _parameters(catalogue: Catalogue) -> Schema:
    """The parameters of all methods: which method has which is for the parser, since slices may have their own."""
    found: dict[str, dict[Param, list[str]]] = {}
    for methods in catalogue.values():
        for method in methods:
            for param in method.params:
                names = found.setdefault(param.name, {}).setdefault(param, [])
                names += [method.name] if method.name not in names else []
    return {
        "type": "object",
        "description": "Parameters of merge methods.",
        "properties": {name: _parameter(forms) for name, forms in found.items()},
        "additionalProperties": False,
    }


def _parameter(forms: Mapping[Param, list[str]]) -> Schema:
    """One parameter: a value, a gradient, or values with filters. Methods may mean different things by one name."""
    docs: dict[str, list[str]] = {}
    for param, methods in forms.items():
        docs.setdefault(param.doc, []).extend(name for name in methods if name not in docs.get(param.doc, ()))
    scalars: list[Schema] = []
    for param in forms:
        scalars += [] if _scalar(param) in scalars else [_scalar(param)]
    scalar = scalars[0] if len(scalars) == 1 else {"anyOf": scalars}
    value = {"anyOf": [scalar, {"type": "array", "items": scalar}]}
    filters = {"filter": {"type": ["string", "null"]}, "layers": {"type": "string"}}
    entry: Schema = {
        "type": "object",
        "properties": {"value": value, **filters},
        "required": ["value"],
        "additionalProperties": False,
    }
    text = "\n".join(f"{', '.join(methods)}: {doc}" for doc, methods in docs.items())
    return {"description": text, "anyOf": [scalar, {"type": "array", "items": {"anyOf": [scalar, entry]}}, entry]}


def _scalar(param: Param) -> Schema:
    if param.kind is str:
        words: Schema = {"enum": list(param.choices)} if param.choices else {"type": "string"}
        return {"anyOf": [words, {"type": ["boolean", "number", "string"]}]} if param.booleans else words
    if param.kind is bool:
        return {"type": ["boolean", *_ANY_NUMBER]}
    limits = {"minimum": param.low, "maximum": param.high}
    return {"type": list(_ANY_NUMBER), **{word: limit for word, limit in limits.items() if limit is not None}}
