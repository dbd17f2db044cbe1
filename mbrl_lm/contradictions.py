"""Configs whose parts contradict each other, and what to change in them."""

from mbrl_lm.config import GROUPED, PLANS, REWARDS, Config, ConfigError


def check(cfg: Config) -> None:
    """Refuses a config whose parts contradict each other.

    Raises:
      ConfigError: naming the first contradiction and what to change.
    """
    model, train, imagine, planner = cfg.model, cfg.train, cfg.imagine, cfg.planner
    online = cfg.data == "concierge"
    negotiation = cfg.data == "deal_or_no_deal"
    rl = train.rl_steps > 0
    doubts = cfg.guard.penalty or cfg.guard.truncation
    for wrong, message in (
        (not online and not cfg.data_dir, f"--config.data={cfg.data} reads raw files: give --config.data_dir=DIR"),
        (cfg.signal not in ("return", "rating", "outcome"), "signal must be return, rating or outcome"),
        (not 2 <= cfg.places[0] <= cfg.places[-1] <= 12 or len(cfg.places) != 2, "places is FEWEST,MOST, from 2 to 12"),
        (not 0 <= cfg.noise < 1, "noise is a probability below 1"),
        (cfg.noise and not online, "noise is put into the users of data=concierge only"),
        (cfg.signal != "return" and not online, f"signal={cfg.signal} is known for data=concierge only"),
        (model.width % model.heads, "model.heads must divide model.width"),
        (model.heads % model.kv_heads, "model.kv_heads must divide model.heads"),
        ((model.width // model.heads) % 2, "model.width / model.heads must be even: rotary embeddings turn pairs"),
        (model.roles not in ("shared", "adapter", "separate"), "model.roles is shared, adapter or separate"),
        (model.value_heads < 1 or model.user_heads < 0, "model.value_heads must be at least 1, model.user_heads at least 0"),
        (model.bins % 2 == 0, "model.bins must be odd: one bin stands at 0"),
        (model.conv_width < 1, "model.conv_width must be at least 1, which is none"),
        (not 0 <= model.dropout < 1, "model.dropout is a probability below 1"),
        (not 0 <= model.word_dropout < 1, "model.word_dropout is a probability below 1"),
        (model.tracked and not model.match_taps, "model.tracked compares tokens: set model.match_taps above 0"),
        (model.dtype not in ("float32", "bfloat16"), "model.dtype must be float32 or bfloat16"),
        (train.optimizer not in ("muon", "adamw"), "train.optimizer must be muon or adamw"),
        (min(train.supervised_steps, train.rl_steps) < 0, "numbers of steps cannot be negative"),
        (train.supervised_steps + train.rl_steps == 0, "train.supervised_steps and train.rl_steps are both 0"),
        (min(train.batch, cfg.turns, cfg.tokens // 16) < 1, "train.batch and turns must be at least 1, tokens at least 16"),
        (any(not 1 <= w <= cfg.tokens for w in cfg.widths), "widths are numbers of tokens, from 1 to that of `tokens`"),
        (not 0 <= train.renamed <= 1, "train.renamed is a part of train.supervised_steps, between 0 and 1"),
        (
            train.renamed and not (online or negotiation),
            f"train.renamed needs names to change, and {cfg.data} has none: set it to 0",
        ),
        (cfg.turn_tokens < 2, "turn_tokens must be at least 2: a word and the hand-over"),
        (rl and imagine.batch and not imagine.reward, "imagined dialogues need imagine.reward; or set imagine.batch=0"),
        (
            not {imagine.reward, planner.reward} <= set(REWARDS),
            f"imagine.reward and planner.reward are {', '.join(REWARDS[1:])}, or empty",
        ),
        (
            "split" in imagine.reward + planner.reward and not negotiation,
            "a reward of split or sure_split reads the outcome of deal_or_no_deal: set imagine.reward and planner.reward",
        ),
        (imagine.sides not in (1, 2), "imagine.sides is 1 or 2"),
        (imagine.sides == 2 and not negotiation, "imagine.sides=2 gives both sides of deal_or_no_deal values: set it to 1"),
        (
            imagine.sides == 2 and cfg.loss.distil,
            "loss.distil imitates what a planner chose from one side's view: set imagine.sides=1",
        ),
        (planner.sides not in (1, 2), "planner.sides is 1 or 2"),
        (planner.sides == 2 and not negotiation, "planner.sides=2 gives both sides of deal_or_no_deal values: set it to 1"),
        (
            planner.sides == 2 and not planner.depth and cfg.plan in ("rollouts", "mpc"),
            "planner.sides=2 is about who replies: set planner.depth above 0",
        ),
        (
            planner.sides == 2 and "learned" in (planner.reward, planner.reward or imagine.reward),
            "planner.sides=2 counts points: set planner.reward to split or sure_split",
        ),
        (imagine.generosity and imagine.sides != 2, "imagine.generosity needs both sides' points: set imagine.sides=2"),
        (imagine.waste and imagine.sides != 2, "imagine.waste needs both sides' points: set imagine.sides=2"),
        (imagine.reward == "learned" and not cfg.loss.reward, "imagine.reward=learned needs loss.reward > 0"),
        (not 0 <= imagine.openings <= 1, "imagine.openings is a part of the prompts, between 0 and 1"),
        (imagine.replies < 0, "imagine.replies cannot be negative"),
        (
            imagine.user not in ("live", "frozen", "population", "oracle"),
            "imagine.user is live, frozen, population or oracle",
        ),
        (imagine.user == "oracle" and not online, f"{cfg.data} has no true user to imagine with: change imagine.user"),
        (
            imagine.user == "oracle" and (imagine.candidates > 1 or not imagine.replies or not imagine.batch),
            "imagine.user=oracle talks to users of its own, once and to the end: set imagine.candidates=1, "
            "imagine.replies and imagine.batch above 0",
        ),
        (
            len(imagine.share) != 2 or not all(0 <= x <= 1 for x in imagine.share),
            "imagine.share is FIRST,LAST, each between 0 and 1",
        ),
        (cfg.control not in ("", "user_gradient", "predictability"), "control is user_gradient or predictability, or empty"),
        (
            cfg.control == "user_gradient" and imagine.user in ("frozen", "oracle"),
            "control=user_gradient bends imagined users who learn: set imagine.user to live or population",
        ),
        (
            doubts and not model.user_heads,
            "guard.penalty and guard.truncation ask an ensemble: set model.user_heads to 5",
        ),
        (
            cfg.start and not train.supervised_steps,
            "start takes a likelihood phase over: set train.supervised_steps",
        ),
        (cfg.plan not in PLANS, f"plan is {', '.join(PLANS[:-1])} or {PLANS[-1]}"),
        (
            cfg.loss.distil and (cfg.plan == "none" or not imagine.batch),
            "loss.distil imitates a planner in imagined dialogues: set plan, and imagine.batch above 0",
        ),
        (
            cfg.loss.distil and (imagine.user == "oracle" or not imagine.replies),
            "loss.distil imitates what a planner chose in imagination: set imagine.user to another than oracle, "
            "imagine.replies above 0",
        ),
        (cfg.plan != "none" and not imagine.reward, f"plan={cfg.plan} asks for a reward: set imagine.reward"),
        (
            min(planner.candidates, planner.futures, planner.iterations, planner.elites, planner.simulations) < 1,
            "planner.candidates, futures, iterations, elites and simulations must be at least 1",
        ),
        (
            min(planner.depth, planner.kappa, planner.temperature, planner.budget, planner.future_tokens) < 0,
            "no planner.* may be negative",
        ),
        (planner.user not in ("reference", "live"), "planner.user is reference or live"),
        (cfg.guard.discriminator >= 1, "guard.discriminator is a probability below 1"),
        (cfg.guard.anchors and not cfg.collect.every, "guard.anchors needs real dialogues: set collect.every"),
        (min(imagine.population, imagine.refresh) < 1, "imagine.population and imagine.refresh must be at least 1"),
        (imagine.candidates < 1 or imagine.batch % imagine.candidates, "imagine.candidates must divide imagine.batch"),
        (cfg.policy.loss not in ("reinforce", "ppo", "awr", "cloning"), "policy.loss is reinforce, ppo, awr or cloning"),
        (cfg.policy.baseline not in ("value", "mean", *GROUPED), f"policy.baseline is value, mean, {' or '.join(GROUPED)}"),
        (
            cfg.policy.baseline in GROUPED and imagine.candidates == 1,
            f"policy.baseline={cfg.policy.baseline} compares candidates of one prompt: set imagine.candidates above 1",
        ),
        (train.rl_epochs < 1, "train.rl_epochs must be at least 1"),
        (cfg.world_model.loss not in ("nll", "mae"), "world_model.loss must be nll or mae"),
        (cfg.world_model.goals < 0 or cfg.world_model.goals == 1, "world_model.goals is at least 2, or 0"),
        (
            model.belief < 0 or model.belief > cfg.world_model.goals,
            "model.belief is of at most as many goals as there are: set world_model.goals as high, or model.belief to 0",
        ),
        (
            cfg.world_model.goals and negotiation,
            "world_model.goals needs contexts that list items: set it to 0",
        ),
        (
            cfg.world_model.goals and not train.supervised_steps and cfg.loss.user and train.rl_steps,
            "world_model.goals are found in the likelihood phase: set them to 0, or train.supervised_steps above 0",
        ),
        (cfg.world_model.tokens not in ("all", "words", "closing"), "world_model.tokens is all, words or closing"),
        (min(imagine.temperature, imagine.user_temperature, cfg.eval.temperature) <= 0, "a temperature must be above 0"),
        (cfg.collect.every and not online, f"{cfg.data} has no true user to collect dialogues with: set collect.every=0"),
        (cfg.eval.dialogues and not (online or negotiation), f"{cfg.data} has nobody to judge it: set eval.dialogues=0"),
        (not 0 <= train.undropped < 1, "train.undropped is a part of train.supervised_steps, below 1"),
        (not 0 < cfg.partner.share < 1, "partner.share is a share of the scenarios, between 0 and 1"),
        (not 0 <= cfg.returns.discount <= 1, "returns.discount is in [0, 1]"),
        (not 0 < cfg.returns.token_discount <= 1, "returns.token_discount is in (0, 1]"),
        (not 0 <= cfg.returns.lambda_ <= 1, "returns.lambda_ is in [0, 1]"),
        (cfg.tokenizer.model_file and cfg.tokenizer.min_count > 1, "tokenizer.min_count has no effect with a model_file"),
    ):
        if wrong:
            raise ConfigError(message)
