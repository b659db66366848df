"""The public client trains on a server of the pocket model: supervised, by reward, by losses of its own."""

import tinker
from serving.tenants.clients import datum, losses, text, tokens

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
