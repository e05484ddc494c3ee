"""`/tokenize`, `/detokenize` and `/chat_tokenize`."""

import asyncio

from fastapi import APIRouter

from server.api.dependencies import Generations
from server.errors import InvalidRequestError
from server.schemas.chat import ChatFields
from server.schemas.tokens import (
    ChatTokenizeRequest,
    ChatTokens,
    DetokenizeRequest,
    Text,
    TokenizeRequest,
    TokenList,
    TokenShown,
)
from server.text import TextCodec, TokenSpan

__all__ = ["router"]

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, generations: Generations) -> list[TokenShown] | TokenList:
    """The tokens of a text: with `inputs` as a list, with `prompt` or `messages` as ids and their number."""
    body.check()
    codec = generations.codec
    add_special_tokens = body.add_special_tokens is not False
    if body.inputs is not None:
        spans = await asyncio.to_thread(codec.spans, body.inputs, add_special_tokens=add_special_tokens)
        return [_shown(span) for span in spans]
    text = body.prompt
    if text is None:
        text, add_special_tokens = await asyncio.to_thread(_rendered, codec, body), bool(body.add_special_tokens)
    ids = await asyncio.to_thread(codec.encode, text, add_special_tokens=add_special_tokens)
    return TokenList(
        count=len(ids),
        max_model_len=generations.engine.runner.max_model_len,
        tokens=ids,
        token_strs=[codec.token_text(token_id) for token_id in ids] if body.return_token_strs else None,
    )


@router.post("/chat_tokenize")
async def chat_tokenize(body: ChatTokenizeRequest, generations: Generations) -> ChatTokens:
    """The prompt that a conversation becomes, and its tokens."""
    body.refuse_unsupported()
    codec = generations.codec
    text = await asyncio.to_thread(_rendered, codec, body)
    spans = await asyncio.to_thread(codec.spans, text, add_special_tokens=False)
    return ChatTokens(tokenize_response=[_shown(span) for span in spans], templated_text=text)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, generations: Generations) -> Text:
    """The text of token ids."""
    codec = generations.codec
    if any(token_id >= codec.vocab_size for token_id in body.tokens):
        message = f"`tokens`: the vocabulary has {codec.vocab_size} tokens"
        raise InvalidRequestError(message, code="token_unknown", param="tokens")
    return Text(prompt=await asyncio.to_thread(codec.decode, body.tokens))


def _rendered(codec: TextCodec, body: ChatFields) -> str:
    return codec.chat_prompt(
        [message.for_template() for message in body.messages],
        tools=[tool.for_template() for tool in body.tools or ()],
        variables=body.template_variables,
        add_generation_prompt=body.add_generation_prompt is not False,
    )


def _shown(span: TokenSpan) -> TokenShown:
    return TokenShown(id=span.token_id, text=span.text, start=span.start, stop=span.stop)
