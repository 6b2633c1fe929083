"""The keywords of a JSON schema that constrained output follows: any other is refused, never ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from vptq_runtime.checks import shown
from vptq_runtime.errors import OptionError

# What they hold: schemas by name, lists of schemas, a schema or a list of them, and what is no schema.
MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
SCHEMAS = frozenset({"items", "additionalItems", "additionalProperties"})
VALUES = frozenset(
    (
        *("$ref", "const", "enum", "type", "minItems", "maxItems", "required", "minProperties"),
        *("maxProperties", "minLength", "maxLength", "pattern", "format", "minimum", "maximum"),
        *("exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)
ANNOTATIONS = frozenset(  # which ask for nothing
    (
        *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "examples"),
        *("deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator"),
    )
)
EMBEDDED = re.compile(r"%json\s*")  # in a Lark grammar


def check_schema(option: str, schema: Any) -> None:
    """Raises OptionError for a keyword that would be ignored.

    llguidance refuses what it knows and lacks, but not what the draft that "$schema" names does not have
    (`if` in draft 4), nor a misspelt keyword; and it counts a property that comes twice as two.
    """
    pending = [("", schema)]
    while pending:
        where, value = pending.pop()
        if not isinstance(value, dict):
            continue  # true and false; the library refuses others
        for keyword, inner in value.items():
            if keyword not in VALUES | ANNOTATIONS:
                pending += _inner_schemas(option, where, keyword, inner)
        least, required = value.get("minProperties"), value.get("required")
        n_required = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least > n_required + 1:
            found = f"found {shown(least)} in {where}/minProperties"
            expected = f"at most {n_required + 1}, one more than are required: names could repeat"
            raise OptionError(f"{option}: {found}, expected {expected}")


def check_embedded_schemas(option: str, grammar: str) -> None:
    """The same for each `%json` of a Lark grammar."""
    end = 0
    while match := EMBEDDED.search(grammar, end):
        try:
            schema, end = json.JSONDecoder().raw_decode(grammar, match.end())
        except (ValueError, RecursionError) as error:
            found = f"found no JSON behind the %json at character {match.start()}"
            raise OptionError(f"{option}: {found}, expected a schema: {error}") from None
        check_schema(option, schema)


def _inner_schemas(option: str, where: str, keyword: str, inner: Any) -> Iterator[tuple[str, Any]]:
    here = f"{where}/{keyword}"
    if keyword in MAPS:
        if isinstance(inner, dict):
            yield from ((f"{here}/{name}", schema) for name, schema in inner.items())
    elif keyword in LISTS | SCHEMAS:
        schemas = inner if isinstance(inner, list) else [inner]
        yield from ((f"{here}/{index}", schema) for index, schema in enumerate(schemas))
    else:
        known = ", ".join(sorted(MAPS | LISTS | SCHEMAS | VALUES))
        found = f"found the keyword {shown(keyword)}{f' in {where}' if where else ''}"
        raise OptionError(f"{option}: {found}, expected one that output can be held to: {known}")
