"""A multipart body as it arrives: its fields are kept, its files go to disk piece by piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import IO, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from simpletuner.errors import Problem, UserError
from simpletuner.server.errors import did_you_mean
from simpletuner.server.uploads.places import shown_text
from simpletuner.server.uploads.stage import naming_failures

BATCH_BYTES = 1 << 20
"""What is handed to the writing thread at once; an upload takes about twice this of memory, however large it is."""
FIELD_BYTES = 64 << 10


class FileSink(Protocol):
    """Takes the files of a form, one after the other."""

    def begin(self, name: str) -> IO[bytes] | None:
        """Where the bytes of `name` go; None to leave them out."""
        ...

    def finish(self, file: IO[bytes], name: str) -> None: ...


class UploadForm:
    """Feed it the body; then `fields` holds the text fields. Its methods block: they belong into a thread."""

    def __init__(
        self,
        boundary: bytes,
        sink: FileSink,
        *,
        files: tuple[str, ...],
        texts: tuple[str, ...],
        before_files: Callable[[Mapping[str, str]], None],
    ) -> None:
        """`files` and `texts` name the fields that may come. `before_files` sees the fields before the first file."""
        self.fields: dict[str, str] = {}
        self.num_files = 0
        self.current = ""
        """Name of the file, or of the field, that is arriving."""
        self._sink = sink
        self._known_files = files
        self._known_texts = texts
        self._before_files = before_files
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._is_file = False
        self._file: IO[bytes] | None = None
        self._text = bytearray()
        self._has_ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._begin_content,
                    "on_part_data": self._take,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _broken(str(error)) from error

    def feed(self, data: bytes) -> None:
        """Raises UserError for what is no such form, and what the sink raises."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _broken(str(error)) from error

    def finish(self) -> None:
        """The body has ended. Raises UserError where the form has not."""
        if not self._has_ended:
            raise _broken(f"it ends within {shown_text(self.current)}" if self.current else "it has no end")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _begin_part(self) -> None:
        self._disposition = b""
        self._text.clear()

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _broken("a part has no name")
        field = options[b"name"].decode(errors="replace")
        self._is_file = b"filename" in options
        self._check_field(field)
        self.current = options[b"filename"].decode(errors="replace") if self._is_file else field
        if not self._is_file:
            return
        if self.num_files == 0:
            self._before_files(self.fields)
        self.num_files += 1
        with naming_failures(self.current):
            self._file = self._sink.begin(self.current)

    def _check_field(self, field: str) -> None:
        known = self._known_files if self._is_file else self._known_texts
        if field in known:
            return
        other = self._known_texts if self._is_file else self._known_files
        if field in other:
            wanted = "text" if self._is_file else "a file"
            raise UserError("invalid_field", f"Field {field} is {wanted}.", pointer=f"/{field}")
        hint = did_you_mean(field, (*known, *other)) or f"Known: {', '.join((*known, *other))}."
        problem = Problem(
            code="unknown_field", message=f"Unknown field {shown_text(field)}.", hint=hint, pointer=f"/{field}"
        )
        raise UserError.from_problems([problem], code="unknown_field")

    def _take(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self._text += data[start:end]
            if len(self._text) > FIELD_BYTES:
                raise UserError("body_too_large", f"Field {self.current} is larger than {FIELD_BYTES} bytes.")
        elif self._file is not None:
            with naming_failures(self.current):
                self._file.write(data[start:end])

    def _end_part(self) -> None:
        if not self._is_file:
            self.fields[self.current] = self._text.decode(errors="replace")
        elif self._file is not None:
            with naming_failures(self.current):
                self._sink.finish(self._file, self.current)
            self._file = None
        self.current = ""

    def _end(self) -> None:
        self._has_ended = True


def read_boundary(request: Request) -> bytes:
    """Raises UserError `unsupported_media_type`."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        hint = "Send the files as multipart/form-data, as `curl -F` does."
        raise UserError("unsupported_media_type", "Files come as multipart/form-data.", hint=hint)
    return options[b"boundary"]


def told_bytes(request: Request) -> int:
    """What the client says of its body's length; 0 where it says nothing."""
    told = request.headers.get("content-length", "")
    return int(told) if told.isdigit() else 0


async def receive_form(request: Request, form: UploadForm, *, most_bytes: int) -> None:
    """Raises UserError `body_too_large` beyond `most_bytes` of body, `body_required` where there is none."""
    if told_bytes(request) > most_bytes:
        raise too_large(most_bytes, "")
    received = 0
    try:
        async for batch in read_batches(request):
            received += len(batch)
            if received > most_bytes:
                raise too_large(most_bytes, form.current)
            await run_in_threadpool(form.feed, batch)
        if not received:
            raise UserError("body_required", "This request needs a body.", hint="Send target_path and the files.")
        form.finish()
    except ClientDisconnect as error:
        raise _broken("the client went away") from error
    finally:
        form.close()


async def read_batches(request: Request) -> AsyncGenerator[bytes]:
    """The body in pieces worth a thread's while. Raises ClientDisconnect, after what had arrived by then."""
    pending = bytearray()
    try:
        async for chunk in request.stream():
            pending += chunk
            if len(pending) >= BATCH_BYTES:
                yield bytes(pending)
                pending.clear()
    except ClientDisconnect:
        if pending:
            yield bytes(pending)
        raise
    if pending:
        yield bytes(pending)


def too_large(most_bytes: int, name: str) -> UserError:
    within = f"; it was reached within {shown_text(name)}" if name else ""
    hint = "Send it in parts through /api/datasets/upload/sessions, or raise SIMPLETUNER_MAX_UPLOAD_BYTES."
    return UserError("body_too_large", f"The upload is larger than {most_bytes} bytes{within}.", hint=hint)


def _broken(reason: str) -> UserError:
    return UserError("invalid_field", f"The body is no whole multipart form: {reason}.")
