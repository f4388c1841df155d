"""A multipart upload, written to disk as it arrives."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import IO, Any, NamedTuple, cast

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from nanogpt.api.decode import clip
from nanogpt.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from nanogpt.jobs.files import Upload

# Of all fields but the file; also what the parser holds of the file, which it is given in pieces of
# 64 KiB.
MAX_FORM_BYTES = 512 * 1024
MAX_PARTS = 16
FRAME_BYTES = 64 * 1024  # what a multipart body has beyond the file


class Received(NamedTuple):
    upload: Upload
    filename: str
    fields: dict[str, str]


class _Sink:
    """What the parser writes one file to."""

    def __init__(self, upload: Upload) -> None:
        self.upload = upload
        self.write = upload.write

    def seek(self, position: int) -> None:
        """The parser goes back to the start when the part is complete; nothing is read here."""


def receive(
    stream: IO[bytes], content_type: str | None, new: Callable[[], Upload], stack: ExitStack
) -> Received:
    """The only file of the form, named "file", and its other fields. What was uploaded is closed
    with the stack. Raises InvalidRequest, UnsupportedMediaType, PayloadTooLarge, Unavailable.
    """
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data":
        raise UnsupportedMediaType(
            "Content-Type must be multipart/form-data, with the parts 'purpose' and 'file'"
        )
    uploads: list[Upload] = []

    def factory(*args: Any, **kwargs: Any) -> IO[bytes]:
        if uploads:
            raise InvalidRequest("send one file only", param="file")
        uploads.append(new())
        stack.callback(uploads[0].close)
        return cast(IO[bytes], _Sink(uploads[0]))

    parser = FormDataParser(
        stream_factory=factory,
        max_form_memory_size=MAX_FORM_BYTES,
        max_form_parts=MAX_PARTS,
        silent=False,
    )
    try:
        _, form, files = parser.parse(stream, kind, None, options)
    except ValueError as error:
        raise InvalidRequest(
            f"can't read the form: {clip(str(error))}; it may have been cut off"
        ) from error
    except RequestEntityTooLarge as error:
        raise PayloadTooLarge("the form is too large; send less, or split the file") from error
    file = files.get("file")
    if file is None:
        raise InvalidRequest("the part 'file' is missing", param="file")
    fields = {}
    for name, values in form.lists():
        if len(values) > 1:
            raise InvalidRequest(f"{clip(name)} is there twice", param=clip(name))
        fields[name] = values[0]
    return Received(uploads[0], file.filename or "file", fields)
