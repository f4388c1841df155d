"""What operators ask of the models in memory, handed to the thread that decides about them."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future

from nanogpt.cluster.residency import ModelStatus, Residency
from nanogpt.errors import Conflict, ModelNotFound, Unavailable
from nanogpt.registry import ModelInfo

ANSWER_S = 5.0  # for that thread to answer


class ModelOrders:
    """Thread-safe. Orders return at once; they raise ModelNotFound, Conflict when they can't be
    carried out, and Unavailable."""

    def __init__(
        self,
        residency: Residency,
        models: Callable[[], Mapping[str, ModelInfo]],
        call: Callable[[Callable[[], None]], None],
    ) -> None:
        """`models` are those that are served; `call` has the deciding thread run something."""
        self._residency, self._models, self._call = residency, models, call

    def models(self) -> Mapping[str, ModelInfo]:
        """Models that are served, by name, in memory or not."""
        return self._models()

    def model_states(self) -> dict[str, ModelStatus]:
        """The same models, as far as their memory is concerned."""
        return {status.name: status for status in self._residency.status()}

    def memory(self) -> tuple[int, int]:
        """Bytes on each rank that models take, and that they may (0: there is no limit)."""
        return self._residency.used, self._residency.budget

    def load(self, model: str) -> None:
        """Have a model loaded, as soon as there is room."""
        self._order(model, self._residency.load)

    def unload(self, model: str) -> None:
        """Have a model unloaded, once what runs on it has finished."""
        self._order(model, self._residency.unload)

    def pin(self, model: str) -> None:
        """Have a model loaded, and kept."""
        self._order(model, self._residency.pin)

    def unpin(self, model: str) -> None:
        """Let a model go again when others need its memory."""
        self._order(model, self._residency.unpin)

    def _order(self, model: str, change: Callable[[str], str]) -> None:
        done: Future[str | None] = Future()

        def carry_out() -> None:
            done.set_result(change(model) if model in self._models() else None)

        self._call(carry_out)
        try:
            problem = done.result(ANSWER_S)
        except TimeoutError:
            raise Unavailable("the front end is busy; try again", code="starting") from None
        if problem is None:
            raise ModelNotFound(f"the model {model!r} is not served here", param="model")
        if problem:
            raise Conflict(problem)
