"""A model's tokenizer and chat template: prompts to token ids, token ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from dormouse.engine.messages import ChatPrompt, Prompt, TextPrompt
from dormouse.errors import RequestError


class ChatTokenizer:
    """The tokenizer of an imported folder, as it was saved there: no class of the model's own is needed."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        self.vocabulary = len(self._tokenizer)
        self.eos_token_id: int | None = self._tokenizer.eos_token_id

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. Raises RequestError when it can't be rendered or is empty."""
        if isinstance(prompt, ChatPrompt):
            ids = self._render(prompt)
        elif isinstance(prompt, TextPrompt):
            ids = self._tokenizer.encode(prompt.text)
        else:
            ids = prompt.ids
            if any(not 0 <= i < self.vocabulary for i in ids):
                raise RequestError(
                    f"token ids must be from 0 to {self.vocabulary - 1}", param="prompt", reason="invalid_value"
                )
        if not ids:
            raise RequestError("the prompt is empty", param="prompt", reason="invalid_value")
        return list(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """One token alone, special or not, with replacement characters for parts of characters."""
        text: str = self._tokenizer.backend_tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def _render(self, prompt: ChatPrompt) -> list[int]:
        if not self._tokenizer.chat_template:
            raise RequestError(
                "this model has no chat template",
                param="messages",
                reason="no_chat_template",
                remedy="Use /v1/completions, or import the model with a chat_template.jinja in its folder",
            )
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                prompt.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            # Templates are programs: a message they did not expect (no content, an unknown role) fails inside them.
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages", reason="invalid_value"
            ) from error
        return ids
