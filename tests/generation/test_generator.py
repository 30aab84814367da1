"""Batches, the cache, sampling, stop texts and streams; and what HF's `generate` does wrong where nothing is done."""

from __future__ import annotations

import threading

import pytest
import torch

from vlmsft.config_files import sample_set
from vlmsft.data.encode import load_image
from vlmsft.data.records import Turn
from vlmsft.errors import UserError
from vlmsft.generation.generate import Prompt, Sampling, _Row

GREEDY = Sampling(max_new_tokens=16)
DRAWN = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.95, top_k=60, repetition_penalty=1.3, seed=7)


def photo(name):
    return load_image(f"{sample_set()}/images/{name}.jpg")


@pytest.fixture(scope="module")
def prompts():
    """Other lengths, one to four tiles, no image to two, a text in front of an image, several turns."""
    turns = (
        Turn("system", ("短く",)),
        Turn("user", (None, "何？")),
        Turn("assistant", ("猫",)),
        Turn("user", ("本当？",)),
    )
    return [
        Prompt.from_text("何が写っていますか？", [photo("cat")]),
        Prompt.from_text("a text without images, and a longer one than the others"),
        Prompt.from_text("一枚目 <image> と二枚目 <image> の違いは？", [photo("page"), photo("moon")]),
        Prompt(turns, (photo("clock"),)),
    ]


def texts(answers):
    return [answer.text for answer in answers]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_batch_gives_what_its_prompts_give_alone(generator, prompts, sampling):
    together = generator.generate(prompts, sampling)
    alone = [generator.generate([prompt], sampling)[0] for prompt in prompts]
    assert together == alone
    assert len(set(texts(together))) == len(prompts)


def test_the_cache_changes_nothing(generator, prompts):
    assert generator.generate(prompts, GREEDY) == generator.generate(prompts, GREEDY, use_cache=False)


def test_images_change_answers(generator):
    cat, page = (generator.generate([Prompt.from_text("何？", [photo(name)])], GREEDY) for name in ("cat", "page"))
    assert cat != page


def test_logits_are_those_of_the_training_encoder_without_padding(generator, loaded):
    """The prompt's tokens, tiles and visible rows as vlmsft.data.encode and the reference take them."""
    image = photo("page")
    turns = (Turn("user", ("見て", None, "何？")), Turn("assistant", ("本です。",)))
    sample = loaded.encoder.encode(turns, [image])
    prompt = Prompt(turns[:1], (image,))
    ids = loaded.encoder.prompt_ids(prompt.turns)
    assert ids == sample.tokens[: len(ids)].tolist()
    inputs = generator.model_inputs([ids, [*ids, *ids]], [prompt, Prompt((*turns, *turns[:1]), (image, image))])
    with torch.inference_mode():
        padded = loaded.model(**inputs).logits[0, -1]
        alone = loaded.model(**generator.model_inputs([ids], [prompt])).logits[0, -1]
    assert torch.allclose(padded, alone, atol=1e-4)
    mask = inputs["cross_attention_mask"][0, -len(ids) :, 0, 0]
    assert mask.nonzero().flatten().tolist() == list(range(int(sample.visible_from[0]), len(ids)))
    assert not inputs["cross_attention_mask"][0, : -len(ids)].any()


def test_padding_on_the_right_would_be_wrong(generator, loaded):
    """HF goes on with the last column of attention and cross-attention mask, which would be a pad token's."""
    short, long = (
        Prompt.from_text("何？", [photo("cat")]),
        Prompt.from_text("これは少し長い質問です。何？", [photo("cat")]),
    )
    ids = [loaded.encoder.prompt_ids(prompt.turns) for prompt in (short, long)]
    inputs = generator.model_inputs(ids, [short, long])
    shift = len(ids[1]) - len(ids[0])
    for name in ("input_ids", "attention_mask", "cross_attention_mask"):
        inputs[name][0] = inputs[name][0].roll(-shift, dims=0)
    right = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=500, eos_token_id=None)
    alone = loaded.model.generate(
        **generator.model_inputs(ids[:1], [short]), max_new_tokens=8, do_sample=False, pad_token_id=500
    )
    assert right[0, len(ids[1]) :].tolist() != alone[0, len(ids[0]) :].tolist()


def test_hf_repetition_penalty_fails_on_image_tokens(generator, loaded, prompts):
    ids = [loaded.encoder.prompt_ids(prompts[0].turns)]
    inputs = generator.model_inputs(ids, prompts[:1])
    with pytest.raises((IndexError, RuntimeError)):
        loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False, repetition_penalty=1.2)
    penalised = Sampling(max_new_tokens=16, repetition_penalty=1.5)
    assert generator.generate(prompts[:1], penalised) != generator.generate(prompts[:1], GREEDY)


def test_the_models_own_sampling_defaults_are_gone(hf_folder, loaded):
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(hf_folder).temperature == 0.6
    config, _ = loaded.model._prepare_generation_config(GenerationConfig(do_sample=True, temperature=1.0), None)
    assert config.temperature == 1.0


def test_draws_follow_the_softmax():
    """Gumbel noise: the shares of 4000 seeds against the probabilities."""
    from vlmsft.generation.generate import _GumbelNoise

    scores = torch.tensor([[2.0, 1.0, 0.0, -float("inf")]])
    draws = [int(_GumbelNoise(seed, torch.device("cpu"))(scores, scores).argmax()) for seed in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    assert torch.allclose(shares, scores.softmax(-1)[0], atol=0.03)


def test_seed_and_temperature(generator, prompts):
    prompts = prompts[:2]
    draw = lambda **values: texts(generator.generate(prompts, Sampling(16, temperature=1.0, **values)))  # noqa: E731
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    greedy = texts(generator.generate(prompts, GREEDY))
    assert draw(seed=1, top_k=1) == greedy == draw(seed=1, top_p=1e-6)


def test_each_prompt_has_its_own_sampling(generator, prompts):
    short = Sampling(max_new_tokens=3)
    mixed = generator.generate(prompts[:2], [short, DRAWN])
    assert mixed == [generator.generate(prompts[:1], short)[0], generator.generate(prompts[1:2], DRAWN)[0]]
    assert (mixed[0].finish_reason, mixed[0].num_tokens) == ("length", 3)


def test_stop_text_ends_and_is_cut_off(generator, prompts):
    whole = generator.generate(prompts[:1], GREEDY)[0].text
    stop = whole[3:6]
    answer = generator.generate(prompts[:1], Sampling(16, stop=(stop,)))[0]
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, Sampling(16, stop=("ZZZ",))], ids=["greedy", "drawn", "stop"])
def test_stream_is_the_answer_in_pieces(generator, prompts, sampling):
    stream = generator.stream(prompts[0], sampling)
    pieces = list(stream)
    assert stream.answer == generator.generate(prompts[:1], sampling)[0]
    assert "".join(pieces) == stream.answer.text and all(pieces) and len(pieces) > 1


def test_cancelled_stream_ends(generator, prompts):
    stream = generator.stream(prompts[0], Sampling(max_new_tokens=100_000))
    for _ in stream:
        stream.cancel()
    assert stream.answer.finish_reason == "cancelled" and stream.answer.num_tokens < 1000


def test_leaving_the_loop_ends_generation(generator, prompts):
    pieces = iter(generator.stream(prompts[0], Sampling(max_new_tokens=100_000)))
    next(pieces)
    pieces.close()
    assert "generation" not in [thread.name for thread in threading.enumerate()]


def test_stream_raises_what_generation_raised(generator):
    with pytest.raises(UserError, match="1 image marker"):
        list(generator.stream(Prompt.from_text("<image>何？"), GREEDY))


def row(loaded, sampling, pieces):
    tokenizer = loaded.encoder.processor.tokenizer.backend_tokenizer
    return _Row(tokenizer, loaded.end_token_ids, sampling, 1, pieces.append)


def test_characters_of_several_tokens_come_whole(loaded):
    """The packaged tokenizer has no token for 鬱 or an emoji: their bytes come one by one."""
    text = "鬱、🦝！"
    tokens = loaded.encoder.processor.tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) > 6
    pieces: list[str] = []
    answer = row(loaded, Sampling(100), pieces)
    for token in [*tokens, 504]:
        answer.push(token)
    assert "".join(pieces) == text == answer.answer().text
    assert "鬱" in pieces and "🦝" in pieces, "each as soon as its last byte is there"


def test_half_a_character_is_left_out_where_the_answer_is_cut(loaded):
    tokens = loaded.encoder.processor.tokenizer.encode("猫鬱", add_special_tokens=False)
    pieces: list[str] = []
    answer = row(loaded, Sampling(len(tokens) - 1), pieces)
    for token in tokens:
        answer.push(token)
    assert (answer.answer().text, answer.finish_reason, pieces) == ("猫", "length", ["猫"])


def test_a_stop_text_is_held_back_until_it_is_sure(loaded):
    tokens = loaded.encoder.processor.tokenizer.encode("abSTOPcd", add_special_tokens=False)
    pieces: list[str] = []
    answer = row(loaded, Sampling(100, stop=("STOP",)), pieces)
    for token in tokens:
        answer.push(token)
    assert ("".join(pieces), answer.answer().text, answer.finish_reason) == ("ab", "ab", "stop")


def test_every_wrong_value_is_named(generator, prompts):
    wrong = Sampling(0, temperature=-1.0, top_p=0.0, top_k=-1, repetition_penalty=0.0, stop=("",))
    with pytest.raises(UserError) as error:
        generator.generate(prompts[:1], wrong)
    assert [problem.where for problem in error.value.problems] == [
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "stop",
    ]
