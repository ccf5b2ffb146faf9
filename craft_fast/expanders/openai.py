"""Variants from any server of the OpenAI chat-completions kind, local or not; standard library only.

A prompt that fails (time, refusal, broken answer) is reported and never fatal. Answers are kept on disk, so a run
that continues asks nothing twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from craft_fast.config import ExpandSettings
from craft_fast.expanders.base import Expansion, fill_instruction, parse_answer
from craft_fast.prompt_lines import excerpt
from craft_fast.records import Prompt
from craft_fast.rng import derive_seed
from craft_fast.store import atomic
from craft_fast.store.digest import digest_json

MAX_ANSWER_BYTES = 1 << 20
MAX_FAILURES_IN_A_ROW = 5
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class _TryError(Exception):
    """One try failed.

    Args:
        why: what to tell the user.
        again: another try may help.
        wait_s: how long the server asked to wait.
        of_server: the server is at fault, not this one prompt (a refusal).
    """

    def __init__(self, why: str, *, again: bool = True, wait_s: float | None = None, of_server: bool = True) -> None:
        super().__init__(why)
        self.again = again
        self.wait_s = wait_s
        self.of_server = of_server


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


class OpenAIExpander:
    """Asks ``{base_url}/chat/completions`` once a prompt.

    Args:
        settings: the expand section; the key is read from the environment variable ``api_key_env``.
        cache_dir: where good answers are kept.
        backoff_s: wait before the second try; doubles with each.
    """

    def __init__(self, settings: ExpandSettings, cache_dir: Path, *, backoff_s: float = 0.5) -> None:
        self.settings = settings
        self.cache_dir = cache_dir
        self.backoff_s = backoff_s
        self.key = digest_json(["openai", settings.base_url, settings.model])
        self._url = settings.base_url.rstrip("/") + "/chat/completions"
        handlers: list[Any] = [_NoRedirect()]
        if urlsplit(self._url).hostname in {"localhost", "127.0.0.1", "::1"}:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def expand(self, prompts: Sequence[Prompt], k: int, seed: int) -> Iterator[Expansion]:
        """Yield the server's versions; after five failed prompts in a row the rest is not asked."""
        failures, last = 0, ""
        for prompt in prompts:
            body = self._request(prompt, k, seed)
            entry = self.cache_dir / f"{digest_json([self._url, body])}.json"
            answer = _read_entry(entry)
            if answer is None and failures >= MAX_FAILURES_IN_A_ROW:
                why = f"not asked, the server failed {failures} times in a row: {last}"
                yield Expansion(prompt.prompt_id, problem=why)
                continue
            if answer is not None:
                yield Expansion(prompt.prompt_id, *parse_answer(answer, prompt.text, k))
                continue
            try:
                answer = self._ask(body)
            except _TryError as err:
                failures, last = failures + err.of_server, str(err)
                yield Expansion(prompt.prompt_id, problem=last)
                continue
            failures = 0
            variants, problem = parse_answer(answer, prompt.text, k)
            if problem is None:
                atomic.write_json(entry, {"answer": answer, "model": self.settings.model})
            yield Expansion(prompt.prompt_id, variants, problem)

    def _request(self, prompt: Prompt, k: int, seed: int) -> dict[str, Any]:
        return {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": fill_instruction(self.settings.instruction, prompt.text, k)}],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_new_tokens,
            "seed": derive_seed(seed, "expand", prompt.prompt_id) % 2**31,
        }

    def _ask(self, body: dict[str, Any]) -> str:
        for attempt in range(self.settings.retries + 1):
            try:
                return self._try(body)
            except _TryError as err:
                if not err.again or attempt == self.settings.retries:
                    raise
                wait = err.wait_s if err.wait_s is not None else self.backoff_s * 2**attempt
                time.sleep(min(wait, 10.0))
        raise _TryError("no try was made")

    def _try(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(self.settings.api_key_env, "").strip():
            headers["Authorization"] = f"Bearer {secret}"
        try:
            request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
            with self._opener.open(request, timeout=self.settings.timeout_s) as response:
                return _content(_read_all(response, time.monotonic() + self.settings.timeout_s))
        except urllib.error.HTTPError as err:
            raise self._http_failure(err) from None
        except TimeoutError:
            raise _TryError(f"no answer within {self.settings.timeout_s:g} s") from None
        except (OSError, HTTPException, ValueError) as err:
            reason = getattr(err, "reason", None)
            if isinstance(reason, TimeoutError):
                raise _TryError(f"no answer within {self.settings.timeout_s:g} s") from None
            what = excerpt(str(reason or err) or type(err).__name__, 100)
            raise _TryError(f"{self.settings.base_url}: {what}") from None

    def _http_failure(self, err: urllib.error.HTTPError) -> _TryError:
        wait_s = None
        with contextlib.suppress(ValueError):
            wait_s = max(0.0, float(err.headers.get("Retry-After") or ""))
        with contextlib.suppress(OSError, HTTPException):
            detail = excerpt(err.read(300).decode("utf-8", "replace"), 100)
        err.close()
        hint = f"; is {self.settings.api_key_env} set?" if err.code in {401, 403} else ""
        return _TryError(f"the server answered {err.code}: {detail}{hint}", again=err.code in _RETRIED, wait_s=wait_s)


def _read_all(response: Any, deadline: float) -> bytes:
    """The body, within the time and size allowed; a server that drips bytes cannot hold the run."""
    data = b""
    while chunk := response.read1(65536):
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise _TryError(f"an answer of more than {MAX_ANSWER_BYTES} bytes", again=False)
        if time.monotonic() > deadline:
            raise TimeoutError
    return data


def _content(data: bytes) -> str:
    """The text of the first choice."""
    try:
        choice = json.loads(data)["choices"][0]
        message = choice["message"]
        refusal = message.get("refusal")
        content = message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        shown = excerpt(data[:200].decode("utf-8", "replace"))
        raise _TryError(f"the answer is not a chat completion: {shown}") from None
    if refusal or choice.get("finish_reason") == "content_filter":
        raise _TryError(f"the model refused: {excerpt(str(refusal or 'content filter'))}", again=False, of_server=False)
    if not isinstance(content, str):
        raise _TryError("the answer holds no text")
    return content


def _read_entry(path: Path) -> str | None:
    """A kept answer; a damaged one is asked again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    answer = value.get("answer") if isinstance(value, dict) else None
    return answer if isinstance(answer, str) else None
