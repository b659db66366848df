"""Protection: adapters whose pictures carry a message of their owner, and the proof of it (AuthenLoRA).

The paper is arXiv 2511.21216. A codec writes messages into latents and reads them from pictures (`codec`, `codec_fit`,
`distortions`; `autoencoding` for the latents of a pipeline). An adapter of the method ``authen-lora`` learns to make
pictures with them (`signing_task` for pipelines, `signing_latents` for a bare network) and is baked for each user
(`bake`); what a picture says is judged against chance (`messages`, `verify`), also after attacks (`robustness`).
"""

from __future__ import annotations

from lorry.core.registry import import_for

import_for("objective", f"{__name__}.signing_task")
import_for("objective", f"{__name__}.signing_latents")
