"""Who sent one request, and what admission says about it."""

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar

from nanogpt.admission_config import ANONYMOUS
from nanogpt.api.admission import Admission, Principal, Ticket
from nanogpt.api.admission.subject import clean_user
from nanogpt.api.plan import Plan, find_model, make_plan
from nanogpt.api.protocol import CompletionRequest, parse_completion, user_of
from nanogpt.errors import ApiError, InvalidRequest
from nanogpt.registry import ModelCard, ModelInfo, aliases
from nanogpt.tokenizer import Tokenizer

T = TypeVar("T")


class Caller:
    """The client of one request, for as long as that takes. Used by one thread at a time.

    `principal` is known once `authenticate` has returned, `user` once the body has been read.
    """

    def __init__(self, admission: Admission, request_id: str) -> None:
        self._admission, self._request_id = admission, request_id
        self.principal: Principal | None = None
        self.user: str | None = None

    def authenticate(self, authorization: str | None, *, admin: bool) -> None:
        """Raises Unauthorized, Banned, RateLimited."""
        self.principal = self._admission.authenticate(
            authorization, admin=admin, request_id=self._request_id
        )

    @property
    def name(self) -> str:
        """Of the key."""
        return self._known.key_name

    @property
    def tenant(self) -> str:
        """A short opaque name of key and user, for a fair share of the engines."""
        text = f"{self._known.key_name}\0{clean_user(self.user)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def weight(self) -> float:
        """The key's share, relative to those of others."""
        return self._known.weight

    @classmethod
    def of_owner(cls, admission: Admission, owner: str, request_id: str) -> "Caller":
        """Whoever left this work to be done later. Raises Unauthorized when the key is gone."""
        caller = cls(admission, request_id)
        caller.principal = admission.named(owner)
        return caller

    @property
    def is_admin(self) -> bool:
        return self._known.admin

    def owns(self, owner: str) -> bool:
        """Whether what belongs to that key may be seen and changed."""
        return self._known.admin or owner == self.name

    def visible(self, models: Mapping[str, T], cards: Mapping[str, ModelCard]) -> dict[str, T]:
        """Those that the key may use: all, or a list that may hold their other names."""
        listed = self._known.models
        if not listed:
            return dict(models)
        other_names = aliases(models, cards)
        allowed = {other_names.get(name, name) for name in listed}
        return {name: info for name, info in models.items() if name in allowed}

    def find_model(
        self, models: Mapping[str, ModelInfo], name: str, cards: Mapping[str, ModelCard]
    ) -> ModelInfo:
        """The loaded model of this name, if the key may use it. Raises ModelNotFound."""
        return find_model(self.visible(models, cards), name, self.visible(cards, cards))

    def read_completion(self, body: bytes, content_type: str | None) -> CompletionRequest:
        """Raises UnsupportedMediaType, InvalidRequest; but Banned or RateLimited for a user who is
        shut out, whatever else is wrong with the request.
        """
        try:
            return parse_completion(body, content_type)
        except InvalidRequest:
            self.user = user_of(body)  # whose mistake it is, and not the whole key's
            self._admission.check_bans(self._known, user=self.user, request_id=self._request_id)
            raise

    def plan(
        self,
        request: CompletionRequest,
        info: ModelInfo,
        tokenizer: Tokenizer,
        clock: Callable[[], float],
    ) -> Plan:
        """As `make_plan`, at the caller's share of the engines."""
        return make_plan(
            request, info, tokenizer, tenant=self.tenant, weight=self.weight, clock=clock
        )

    def count_request(self, model: str) -> None:
        """For tokenising. Raises RateLimited."""
        self._admission.count_request(self._known, request_id=self._request_id, model=model)

    def precheck(self, user: str | None, model: str, priority: int) -> None:
        """Before any work is done. Raises Banned, RateLimited, Unavailable, and InvalidRequest for
        a priority before everybody else's (it preempts their choices)."""
        self.user = user
        self._admission.precheck(self._known, user=user, request_id=self._request_id, model=model)
        if priority < 0 and self.name != ANONYMOUS and not self._known.admin:
            raise InvalidRequest(
                "priority below 0 goes before everybody else's and needs an admin key; "
                "use 0, or more to go after them",
                param="priority",
            )

    def check_still_allowed(self) -> None:
        """While a request runs. Raises Banned; a cool-down lets it finish."""
        self._admission.check_running(self._known, user=self.user, request_id=self._request_id)

    def admit(self, plan: Plan) -> Ticket:
        """Reserve the tokens that the plan may take. Raises RateLimited, InvalidRequest,
        Unavailable."""
        request = plan.request
        choices = len(request.prompts) * request.n
        return self._admission.admit(
            self._known,
            user=self.user,
            request_id=self._request_id,
            model=request.model,
            prompts=plan.prompt_texts,
            prompt_tokens=plan.prompt_tokens,
            max_new_tokens=choices * request.params.max_tokens,
        )

    def admit_line(self, plan: Plan) -> None:
        """As `admit`, for a line of a batch: it counts against no limit, since it waits until
        nobody else has work. Raises Banned, and InvalidRequest for blocked content."""
        self._admission.admit_line(
            self._known,
            user=self.user,
            request_id=self._request_id,
            model=plan.request.model,
            prompts=plan.prompt_texts,
            prompt_tokens=plan.prompt_tokens,
        )

    def refused(self, error: ApiError) -> None:
        """Notice the error that the client gets. Nothing to notice when nobody knows who it is."""
        if self.principal is not None:
            self._admission.refused(
                self.principal, user=self.user, request_id=self._request_id, error=error
            )

    def headers(self) -> dict[str, str]:
        """x-ratelimit-*, when limits are configured."""
        if self.principal is None:
            return {}
        return self._admission.headers(self.principal, self.user)

    @property
    def _known(self) -> Principal:
        assert self.principal is not None, "authenticate comes first"
        return self.principal
