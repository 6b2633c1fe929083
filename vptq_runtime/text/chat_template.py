"""Chat templates: messages to the text that the model was trained on.

Rendered by jinja2 with the settings that `transformers` uses, so that templates mean the same here. A
template comes out of a model file and is not trusted: jinja2's sandbox keeps it from reaching Python, a clock
keeps it from running on, and limits on sizes from filling the memory: on every value that an operation makes,
with all that is nested in it, and on all such values together.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from vptq_runtime.checks import shown
from vptq_runtime.errors import FileError, OptionError, UnsupportedError

if TYPE_CHECKING:
    from vptq_runtime.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
T = TypeVar("T")

MAX_SECONDS = 5.0  # real templates take milliseconds
MAX_TEMPLATE = 2**17  # characters; jinja2 compiles that in seconds, and no clock runs then
MAX_CHARACTERS = 2**20  # of what one operation may give, and of the result
MAX_TOTAL = 2**27  # characters of what all operations of one rendering may give
ELEMENT = 8  # characters that an element of a list counts as: the bytes of a pointer
WIDTH_FILTERS = ("batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap")
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # templates' names, GGUF's
NO_TEMPLATE = (
    "the model has no chat template (tokenizer.chat_template), expected an instruct model's; "
    "to continue a text, use generate (vptq-run: -p without --chat)"
)


class ChatTemplate:
    """The chat template of one model file.

    `template` is the file's tokenizer.chat_template, `special_tokens` the variables that it may use, such as
    bos_token; `file` names the model in error messages. Raises UnsupportedError where there is no template.
    """

    def __init__(self, template: object, special_tokens: Mapping[str, str], file: str) -> None:
        if template is None:
            raise UnsupportedError(f"{file}: {NO_TEMPLATE}")
        if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
            found = f"{len(template)} characters" if isinstance(template, str) else type(template).__name__
            expected = f"a string of at most {MAX_TEMPLATE} characters"
            raise FileError(f"{file}: tokenizer.chat_template: found {found}, expected {expected}")
        self._special_tokens = special_tokens
        self._where = f"{file}: tokenizer.chat_template"
        with self._template_errors():
            _budget.left = MAX_TOTAL  # jinja2 works constants out while it compiles
            self._template = _Sandbox().from_string(template)

    @classmethod
    def of_file(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer, file: str) -> ChatTemplate:
        """That of a GGUF file's metadata, with the special tokens that are named there."""
        special_tokens = {}
        for name, key in SPECIAL_TOKENS.items():
            token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
            token = tokenizer.token(token_id) if isinstance(token_id, int) else None
            if token is not None:
                special_tokens[f"{name}_token"] = token
        return cls(metadata.get("tokenizer.chat_template"), special_tokens, file)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the assistant's next message.

        Raises OptionError for malformed messages, and where the template itself refuses them (roles that do
        not alternate, say); FileError where the template is at fault.
        """
        _check_messages(messages)
        length, parts = 0, []
        with self._template_errors(), _limits():
            for part in self._template.generate(
                **self._special_tokens,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
            ):
                length += len(part)
                if length > MAX_CHARACTERS:
                    raise SecurityError(f"the result has more than {MAX_CHARACTERS} characters")
                parts.append(part)
        return "".join(parts)

    @contextlib.contextmanager
    def _template_errors(self) -> Iterator[None]:
        try:
            yield
        except _Refused as refusal:
            raise OptionError(f"messages: the model's chat template says: {_one_line(refusal)}") from None
        except Exception as error:  # a template can raise whatever Python's operators can
            line = getattr(error, "lineno", None)
            place = f" line {line}:" if isinstance(line, int) else ""
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise FileError(f"{self._where}:{place} {kind}{_one_line(error)}") from None


def trimmed(
    messages: Sequence[Message], count_tokens: Callable[[Sequence[Message]], int], most_tokens: int
) -> list[Message]:
    """`messages` without the oldest turns, so many that `count_tokens` gives at most `most_tokens`.

    A leading system message stays, and the last turn; a turn goes whole, from one user message to the next.
    """
    kept = list(messages)
    first = 1 if kept and kept[0]["role"] == "system" else 0
    while count_tokens(kept) > most_tokens:
        users = [index for index in range(first + 1, len(kept)) if kept[index]["role"] == "user"]
        if not users:
            break
        del kept[first : users[0]]
    return kept


class _Refused(TemplateError):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks text to train on; here it is only the text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Budget(threading.local):
    """What is left of MAX_TOTAL to the rendering of this thread."""

    left = MAX_TOTAL


_budget = _Budget()


class _Code(CodeGenerator):
    """Hands over what the sandbox does not ask about: the operator ~ and written lists, tuples and dicts."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.finalize(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":  # names that are assigned to
            super().visit_Tuple(node, frame)
            return
        self.write("environment.finalize(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.finalize(")
        super().visit_Dict(node, frame)
        self.write(")")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Adds to the sandbox what keeps single operations small, which no clock can stop."""

    code_generator_class = _Code
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, LoopControlExtension],
            finalize=_checked_size,
        )
        del self.globals["lipsum"]
        self.filters["tojson"] = _tojson
        for name, function in self.filters.items():
            self.filters[name] = _bounded(name, function)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    @staticmethod
    def concat(parts: Iterable[Any]) -> str:
        return _checked_size("".join([str(_checked_size(part)) for part in parts]))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_growth(_format_weight(left), right)
        if operator == "**" and (max(abs(left), abs(right)) > MAX_CHARACTERS or right > 64):
            raise SecurityError("found a power of numbers that are too large")
        if operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if hasattr(sequence, "__len__") and len(sequence) * count > MAX_CHARACTERS:
                    raise SecurityError(f"found a repetition of more than {MAX_CHARACTERS} characters")
        return _checked_size(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        plain = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format
        owner = getattr(plain, "__self__", None)
        if isinstance(owner, str):
            is_format = plain.__name__ in ("format", "format_map")
            weight = _format_weight(owner) if is_format else len(owner)
            _check_growth(weight, *args, *kwargs.values(), widths=not is_format)
        _checked_size((args, kwargs))
        return _checked_size(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # No template needs bytes.
        return attr not in ("encode", "to_bytes") and super().is_safe_attribute(obj, attr, value)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        weight = _format_weight(args[0]) if name == "format" and isinstance(args[0], str) else 0
        _check_growth(weight, *args, *kwargs.values(), widths=name in WIDTH_FILTERS)
        _checked_size((args, kwargs))
        return _checked_size(function(*args, **kwargs))

    return checked


def _checked_size(value: T) -> T:
    """A value that an operation takes or gives, with all that is nested in it."""
    size = _size(value)
    if size > min(MAX_CHARACTERS, _budget.left):
        most = MAX_CHARACTERS if size > MAX_CHARACTERS else f"{MAX_TOTAL} in all"
        raise SecurityError(f"found a value of more than {most} characters")
    _budget.left -= size
    return value


def _size(value: Any) -> int:
    """In characters, up to where it is too large. What stands in it twice counts twice, as it does for
    whatever walks through it."""
    size = 0
    left = [value]
    while left and size <= MAX_CHARACTERS:
        item = left.pop()
        if isinstance(item, Namespace):
            item = object.__getattribute__(item, "_Namespace__attrs")
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, list | tuple | dict | set):
            size += ELEMENT * len(item)
        elif isinstance(item, int):
            size += item.bit_length() // 8
        if size <= MAX_CHARACTERS and isinstance(item, list | tuple | dict | set):
            left += chain(item, item.values()) if isinstance(item, dict) else item
    return size


def _check_growth(weight: int, *arguments: Any, widths: bool = False) -> None:
    """Refuses an operation whose result could be too large: at the most, each character of one argument
    becomes as much as all others together. `weight`: of one more; `widths`: numbers are widths, too."""
    weights = [weight]
    for argument in arguments:
        if isinstance(argument, int) and not isinstance(argument, bool):
            if widths and abs(argument) > MAX_CHARACTERS:
                raise SecurityError(f"found {shown(argument)}, expected widths of at most {MAX_CHARACTERS}")
            weights.append(abs(argument) if widths else 0)
        else:
            weights.append(MAX_CHARACTERS if isinstance(argument, Iterator) else _size(argument))
    largest = max(weights)
    if largest * (1 + sum(weights) - largest) > MAX_TOTAL:
        raise SecurityError(f"found values that could give more than {MAX_TOTAL} characters")


def _format_weight(text: str) -> int:
    """Of a format string: its length times the largest width in it. Widths that are arguments are refused."""
    if re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*[:!][^{}]*\{", text):
        raise SecurityError(f"found {shown(text)}, expected widths in the format itself")
    specs = re.findall(r"%[^a-zA-Z%]*|:[^{}]*\}", text)
    return len(text) * (1 + max((int(n) for spec in specs for n in re.findall(r"\d{1,9}", spec)), default=0))


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Stops template code after MAX_SECONDS.

    A loop in a template is a loop in Python, in this thread, and gives control back to nobody; a trace
    function is what Python offers to get between its lines. A debugger sees nothing meanwhile: the price.
    """
    _budget.left = MAX_TOTAL
    own = globals()
    deadline = time.monotonic() + MAX_SECONDS

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > deadline:
            raise SecurityError(f"did not finish within {MAX_SECONDS:g} seconds")
        return None if frame.f_globals is own else trace  # what is in this file ends by itself

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        expected = "a list of dicts with role and content"
        raise OptionError(f"messages: found {shown(messages)}, expected {expected}")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                expected = f"a dict with a string {key!r}"
                raise OptionError(f"messages[{index}]: found {shown(message)}, expected {expected}")
    length = sum(len(message["role"]) + len(message["content"]) for message in messages)
    if length > MAX_CHARACTERS:
        raise OptionError(f"messages: found {length} characters, expected at most {MAX_CHARACTERS}")


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
