"""The public client trains on a server of the pocket model: supervised, by reward, by losses of its own."""

import pytest
import tinker
import torch
from serving.tenants.clients import datum, logprobs, losses, text, tokens

from lorry import pocket


def test_a_skill_is_learned_and_the_sampled_answers_are_right(client):
    trained = client.create_lora_training_client("pocket", rank=16, seed=1).result()
    data = [datum(example) for example in pocket.examples("star", "train", 16, seed=0)]
    found = losses(trained, [data] * 12, rate=1e-2)
    assert found[-1] < 0.2 * found[0]
    sampler = trained.save_weights_and_get_sampling_client().result()
    asked = pocket.examples("star", "train", 16, seed=0)[:4]
    params = tinker.SamplingParams(max_tokens=12, temperature=0.0)
    answers = [sampler.sample(tinker.ModelInput.from_ints(tokens(e.prompt)), 1, params) for e in asked]
    assert [text(a.result().sequences[0].tokens) for a in answers] == [e.answer for e in asked]


def rewarded(sampler, prompts, seed):
    """Return eight answers to each prompt, with their rewards: the part of letters of the alphabet's first half."""
    params = tinker.SamplingParams(max_tokens=6, temperature=1.0, seed=seed)
    asked = [sampler.sample(tinker.ModelInput.from_ints(prompt), 8, params) for prompt in prompts]
    groups = [each.result().sequences for each in asked]
    return [[(s, sum(c in "abcdefghijklm" for c in text(s.tokens)) / 6) for s in group] for group in groups]


def policy_datum(prompt, sequence, advantage):
    answer, before = list(sequence.tokens), len(prompt) - 1
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([*prompt, *answer][:-1]),
        loss_fn_inputs={
            "target_tokens": [*prompt, *answer][1:],
            "logprobs": [0.0] * before + list(sequence.logprobs),
            "advantages": [0.0] * before + [advantage] * len(answer),
        },
    )


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo"])
def test_a_reward_rises(client, loss):
    trained = client.create_lora_training_client("pocket", rank=8, seed=2).result()
    prompts = [tokens("nz"), tokens("qq")]
    means = []
    for step in range(8):
        sampler = trained.save_weights_and_get_sampling_client().result()
        groups = rewarded(sampler, prompts, 10 * step)
        rewards = torch.tensor([[reward for _, reward in group] for group in groups])
        means.append(rewards.mean().item())
        data = [
            policy_datum(prompt, sequence, reward - rewards[n].mean().item())
            for n, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
            for sequence, reward in group
        ]
        done = trained.forward_backward(data, loss)
        trained.optim_step(tinker.AdamParams(learning_rate=5e-3)).result()
        if step == 0:  # the sampler's log-probabilities are those of the model
            said = torch.cat([torch.as_tensor(o["logprobs"].data) for o in done.result().loss_fn_outputs])
            sampled = torch.cat([torch.as_tensor(d.loss_fn_inputs["logprobs"].data) for d in data])
            assert torch.allclose(said[sampled != 0], sampled[sampled != 0], atol=1e-4)
    assert sum(means[-2:]) / 2 > means[0] + 0.3, means


def test_a_loss_of_the_client_s_own_gives_the_gradient_of_the_built_in_one(client):
    data = [datum(example) for example in pocket.examples("swap", "train", 4, seed=0)]
    found = []
    for own in (False, True):
        trained = client.create_lora_training_client("pocket", rank=4, seed=3).result()
        for _ in range(2):
            if own:
                done = trained.forward_backward_custom(data, weighted)
            else:
                done = trained.forward_backward(data, "cross_entropy")
            trained.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
            done = done.result()
        found.append((done.metrics["loss:sum"], logprobs(trained, data)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert torch.allclose(found[1][1], found[0][1], atol=1e-4)


def weighted(data, found):
    weights = [torch.as_tensor(each.loss_fn_inputs["weights"].data) for each in data]
    return -sum((p * w).sum() for p, w in zip(found, weights, strict=True)), {"own": 1.0}


def test_samples_tell_log_probabilities_of_prompt_and_alternatives(client):
    sampler = client.create_sampling_client(base_model="pocket").result()
    prompt = tokens("reverse:lorry>")
    params = tinker.SamplingParams(max_tokens=3, temperature=0.0)
    ask = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2}
    answer = sampler.sample(tinker.ModelInput.from_ints(prompt), 1, params, **ask).result()
    model, _ = pocket.load()
    whole = torch.tensor([[*prompt, *answer.sequences[0].tokens]])
    with torch.no_grad():
        exact = model(whole).logits[0].log_softmax(-1)
    said = exact[:-1].gather(1, whole[0, 1:, None])[:, 0]
    before = len(prompt) - 1
    assert answer.prompt_logprobs[0] is None
    assert torch.allclose(torch.tensor(answer.prompt_logprobs[1:]), said[:before], atol=1e-4)
    assert torch.allclose(torch.tensor(answer.sequences[0].logprobs), said[before:], atol=1e-4)
    top = exact[before - 1].topk(2)
    assert [token for token, _ in answer.topk_prompt_logprobs[-1]] == top.indices.tolist()
