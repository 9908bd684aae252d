"""Metric names, `<area>/<name>`; docs/metrics.md explains each one.

A row of metrics.jsonl is `{"step": int, <name>: float, ...}`. Names under `time/` are left out when
runs are compared bit for bit.
"""

TRAIN_LOSS = "train/loss"
TRAIN_LR = "train/lr"
TRAIN_GRAD_NORM = "train/grad_norm"
TRAIN_TOKENS = "train/tokens"
TRAIN_SAFETY_LOSS = "train/safety_loss"

REWARD_ACCURACY = "reward/accuracy"
REWARD_GAP = "reward/gap"

ROLLOUT_SCORE_HELPFULNESS = "rollout/score_helpfulness"
ROLLOUT_SCORE_SAFETY = "rollout/score_safety"
ROLLOUT_SCORE = "rollout/score"
ROLLOUT_REWARD = "rollout/reward"
ROLLOUT_KL = "rollout/kl"
ROLLOUT_KL_TO_START = "rollout/kl_to_start"
ROLLOUT_RESPONSE_LENGTH = "rollout/response_length"
ROLLOUT_FINISHED_FRACTION = "rollout/finished_fraction"
ROLLOUT_SAFETY_SELECTED = "rollout/safety_selected_fraction"

PPO_POLICY_LOSS = "ppo/policy_loss"
PPO_VALUE_LOSS = "ppo/value_loss"
PPO_APPROX_KL = "ppo/approx_kl"
PPO_CLIPFRAC = "ppo/clipfrac"
PPO_ENTROPY = "ppo/entropy"
PPO_EXPLAINED_VARIANCE = "ppo/explained_variance"
PPO_FIRST_RATIO = "ppo/first_ratio"
PPO_HELDOUT_SCORE = "ppo/heldout_score"

REJECTION_MAX_SCORE = "rejection/max_score"
REJECTION_MEDIAN_SCORE = "rejection/median_score"

EVAL_WIN_RATE = "eval/win_rate"
EVAL_VIOLATION_RATE = "eval/violation_rate"
EVAL_OVER_REFUSAL_RATE = "eval/over_refusal_rate"
EVAL_KL = "eval/kl"
EVAL_RESPONSE_LENGTH = "eval/response_length"

TIME_STEP = "time/step"
"""Seconds of wall time that a step took."""
TIME_TOKENS_PER_SECOND = "time/tokens_per_second"
