"""Twenty JSON schemas whose texts are short."""

import jsonschema

WORD = {"type": "string", "maxLength": 12}
SMALL = {"type": "integer", "minimum": 0, "maximum": 150}


def record(**properties):
    """An object with these properties, all of them and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = {
    "person": record(name=WORD, age=SMALL),
    "nested": record(a=record(b=record(c={"type": "boolean"}))),
    "array": {"type": "array", "items": SMALL, "minItems": 1, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [WORD, SMALL], "items": False, "minItems": 2},
    "enum": record(color={"enum": ["red", "green", "dark blue", 7, None, True]}),
    "const": record(version={"const": 1.5}, name={"const": "été"}),
    "any_of": {"anyOf": [record(text=WORD), record(number=SMALL)]},
    "optional": {**record(a=WORD, b=SMALL, c={"type": "null"}), "required": ["b"]},
    "pattern": record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "uuid": record(id={"type": "string", "format": "uuid"}),
    "ipv4": record(host={"type": "string", "format": "ipv4"}),
    "range": record(x={"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.25}),
    "lengths": record(exact={"type": "string", "minLength": 3, "maxLength": 5}),
    "definitions": {
        **record(p={"$ref": "#/$defs/q"}, q={"$ref": "#/$defs/q"}),
        "$defs": {"q": WORD},
    },
    "types": record(value={"type": ["integer", "boolean", "null"], "minimum": -9, "maximum": 99}),
    "string": {"type": "string", "maxLength": 20},
    "boolean": {"type": "boolean"},
    "tool": record(
        name={"const": "weather"}, arguments=record(city=WORD, unit={"enum": ["C", "F"]})
    ),
    "list_of_records": {
        "type": "array",
        "items": record(id=SMALL, ok={"type": "boolean"}),
        "maxItems": 2,
    },
    "unicode": record(**{"größe": SMALL, "名前": WORD, 'quo"te': {"type": "null"}}),
}
assert len(SCHEMAS) == 20


def errors_of(schema, value):
    """What is wrong with a value, by another library."""
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
    return [error.message for error in validator.iter_errors(value)]
