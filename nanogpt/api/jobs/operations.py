"""The routes of what is stored, for the contract."""

from nanogpt.api.jobs import objects
from nanogpt.api.jobs.batches import CreateBatch
from nanogpt.api.jobs.files import UploadForm
from nanogpt.api.operation import Operation

_PLAIN = (404, 500, 503)
_QUERY = (400, 404, 500, 503)
_POST = (400, 404, 408, 413, 415, 500, 503)

JOB_OPERATIONS = (
    Operation(
        method="get",
        path="/v1/completions/{id}",
        summary="A stored completion. With stream=true its events, those after number "
        "starting_after or all, as they come.",
        answer=objects.StoredCompletion,
        query=("stream", "starting_after"),
        errors=_QUERY,
        streams=True,
    ),
    Operation(
        method="delete",
        path="/v1/completions/{id}",
        summary="Forget a stored completion; one that still runs is stopped.",
        answer=objects.Deleted,
        errors=_PLAIN,
    ),
    Operation(
        method="post",
        path="/v1/completions/{id}/cancel",
        summary="Stop a stored completion. Asking again changes nothing.",
        answer=objects.StoredCompletion,
        errors=_QUERY,
    ),
    Operation(
        method="post",
        path="/v1/files",
        summary="Upload the input of a batch: a JSONL file.",
        form=UploadForm,
        answer=objects.FileObject,
        errors=_POST,
        once=True,
    ),
    Operation(
        method="get",
        path="/v1/files",
        summary="Your files, the newest first.",
        answer=objects.FileList,
        query=("after", "limit", "order", "purpose"),
        errors=_QUERY,
    ),
    Operation(
        method="get",
        path="/v1/files/{id}",
        summary="What is known of a file.",
        answer=objects.FileObject,
        errors=_PLAIN,
    ),
    Operation(
        method="get",
        path="/v1/files/{id}/content",
        summary="What is in a file.",
        answer="application/octet-stream",
        errors=_PLAIN,
    ),
    Operation(
        method="delete",
        path="/v1/files/{id}",
        summary="Delete a file.",
        answer=objects.Deleted,
        errors=_PLAIN,
    ),
    Operation(
        method="post",
        path="/v1/batches",
        summary="Have every line of a file completed, when nobody else has work.",
        body=CreateBatch,
        answer=objects.Batch,
        errors=_POST,
        once=True,
    ),
    Operation(
        method="get",
        path="/v1/batches",
        summary="Your batches, the newest first.",
        answer=objects.BatchList,
        query=("after", "limit"),
        errors=_QUERY,
    ),
    Operation(
        method="get",
        path="/v1/batches/{id}",
        summary="How far a batch is.",
        answer=objects.Batch,
        errors=_PLAIN,
    ),
    Operation(
        method="post",
        path="/v1/batches/{id}/cancel",
        summary="Stop a batch; what is done by then is in its files. Asking again changes nothing.",
        answer=objects.Batch,
        errors=_QUERY,
    ),
)
