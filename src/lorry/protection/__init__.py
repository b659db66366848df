"""Protection: adapters whose pictures carry a message of their owner, and the proof of it (AuthenLoRA).

The paper is arXiv 2511.21216. A codec writes messages into latents and reads them from pictures (`codec`, `codec_fit`,
`distortions`). An adapter of the method ``authen-lora`` learns to make pictures with them (`signing_task`), is baked
for each user (`bake`), and what a picture says is judged against chance (`messages`, `verify`), also after attacks
(`robustness`).
"""
