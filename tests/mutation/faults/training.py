"""Faults: Training and evaluation."""

from __future__ import annotations

from .guards import BACKBONES, CHECKS, SEGMENT_METHOD, Fault, Guard

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/cli/train.py": [
        Fault("--model ignored", '_MODELS[arguments.model or "deeplabv3"]', '_MODELS["deeplabv3"]'),
        Fault("--separable ignored", '"separable": arguments.separable', '"separable": False'),
        Fault(
            "--atrous-rates ignored",
            'for name in ("output_stride", "atrous_rates")',
            'for name in ("output_stride",)',
        ),
        Fault(
            "--model may contradict --weights",
            "if arguments.model is not None and not isinstance(model, _MODELS[arguments.model]):",
            "if False:",
        ),
        Fault(
            "--separable may contradict --weights",
            'if arguments.separable and not model.config["separable"]:',
            "if False:",
        ),
        Fault(
            "--weights as they are",
            "load_model(arguments.weights, **_geometry(arguments))",
            "load_model(arguments.weights)",
        ),
    ],
    "deeplab_fast/training/checkpoint.py": [
        Fault("a file named before it is on the disk", "os.fsync(file.fileno())", "pass"),
        Fault("a checkpoint without its average", '"average", ', ""),
        Fault(
            "NumPy's generator not restored",
            '    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), *rest))\n',
            "",
        ),
        Fault("Python's generator not restored", '    random.setstate(state["python"])\n', ""),
        Fault("torch's generator not restored", '    torch.set_rng_state(state["torch"])\n', ""),
    ],
    "deeplab_fast/training/distributed.py": [
        Fault(
            "every process writes",
            "    if rank() == 0:\n        try:",
            "    if True:\n        try:",
        ),
        Fault(
            "errors of other processes ignored",
            "        if message is not None:\n            raise",
            "        if False:\n            raise",
        ),
    ],
    "deeplab_fast/training/evaluation.py": [
        Fault("no labelled pixel is no error", "if not confusion.any():", "if False:", CHECKS),
        Fault(
            "all processes evaluate the same images",
            "range(distributed.rank(), len(data), distributed.world_size())",
            "range(0, len(data), distributed.world_size())",
        ),
        Fault("evaluated in training mode", "    model.eval()\n", ""),
        Fault("mode not restored", "            model.train()\n", "            pass\n"),
        Fault(
            "dtype ignored",
            "enabled=dtype != torch.float32):\n                labels",
            "enabled=False):\n                labels",
        ),
        Fault(
            "scales ignored",
            "tuple(target.shape), scales, flip, window",
            "tuple(target.shape), (1.0,), flip, window",
        ),
        Fault(
            "flip ignored",
            "tuple(target.shape), scales, flip, window",
            "tuple(target.shape), scales, False, window",
        ),
        Fault(
            "window ignored",
            "tuple(target.shape), scales, flip, window",
            "tuple(target.shape), scales, flip",
        ),
        Fault("scores of one process", "distributed.sum_over_processes(total)", "total"),
    ],
    "deeplab_fast/models/preprocessing.py": [
        Fault(
            "images not resized",
            "network_size(image.size, preprocessing.resize, align_corners)",
            "network_size(image.size, None, align_corners)",
        ),
        Fault(
            "sizes for align_corners ignored",
            "network_size(image.size, preprocessing.resize, align_corners)",
            "network_size(image.size, preprocessing.resize, False)",
        ),
        Fault(
            "images cropped",
            "replace(preprocessing, resize=None, crop=None)",
            "replace(preprocessing, resize=None)",
        ),
        Fault(
            "channels of other checkpoints are not averaged",
            "(sum(values) / 3,) if channels == 1",
            "values[:1] if channels == 1",
            BACKBONES,
        ),
        Fault("photos for any network", "not in (1, 3)", "not in (1, 3, 4)", BACKBONES),
    ],
    "deeplab_fast/models/sliding_window.py": [
        Fault(
            "mirrored images not mirrored",
            "(scaled, scaled.flip(3)) if flip",
            "(scaled, scaled) if flip",
        ),
        Fault(
            "mirrored maps not turned back",
            "maps.append((logit_map, view is not scaled))",
            "maps.append((logit_map, False))",
        ),
        Fault(
            "logits averaged instead of probabilities", "return logits.softmax(1)", "return logits"
        ),
        Fault(
            "overlapping windows added up",
            "return _LogitMap(total / counts, size",
            "return _LogitMap(total, size",
        ),
        Fault(
            "the last window counts",
            "total[:, :, rows, columns] += logits",
            "total[:, :, rows, columns] = logits",
        ),
        Fault("windows do not overlap", "window * 2 // 3 // _STEP", "window // _STEP"),
        Fault(
            "padding stretched over the image", "if seen == covered or seen == size:", "if True:"
        ),
        Fault(
            "no half pixel between the grids",
            "position = (position + 0.5) * (seen / size * low / covered) - 0.5",
            "position = position * (seen / size * low / covered)",
        ),
        Fault("probabilities added up", "total[0] / len(self.maps)", "total[0]", SEGMENT_METHOD),
        Fault("any scales", 'real(scale, "scales")', "float(scale)", SEGMENT_METHOD),
    ],
    "deeplab_fast/training/loader.py": [
        Fault(
            "all epochs in one order",
            "np.random.default_rng([recipe.seed, epoch])",
            "np.random.default_rng([recipe.seed, 0])",
        ),
        Fault(
            "order without the seed",
            "np.random.default_rng([recipe.seed, epoch])",
            "np.random.default_rng([0, epoch])",
        ),
        Fault(
            "all epochs augmented alike",
            "np.random.default_rng([self.recipe.seed, *key])",
            "np.random.default_rng([self.recipe.seed, key[1]])",
        ),
        Fault(
            "all images augmented alike",
            "np.random.default_rng([self.recipe.seed, *key])",
            "np.random.default_rng([self.recipe.seed, key[0]])",
        ),
        Fault(
            "augmentation without the seed",
            "np.random.default_rng([self.recipe.seed, *key])",
            "np.random.default_rng([0, *key])",
        ),
        Fault(
            "last batch dropped",
            "return -(-images // recipe.batch_size)",
            "return max(1, images // recipe.batch_size)",
        ),
        Fault("all processes see the same images", "[rank::world_size]", "[::world_size]"),
        Fault("micro-batches overlap", "chosen[i * size : (i + 1) * size]", "chosen[:size]"),
        Fault(
            "a resumed run starts over",
            "for step in range(first_step, steps",
            "for step in range(0, steps",
        ),
        Fault("the loader draws from dropout's generator", "generator=torch.Generator(),", ""),
        Fault(
            "threads of workers take SIGTERM",
            "before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})",
            "before = signal.pthread_sigmask(signal.SIG_BLOCK, set())",
        ),
    ],
    "deeplab_fast/training/log.py": [
        Fault("the last point of a curve drawn twice", "purge_step=step + 1", "purge_step=step"),
        Fault("scores among those of training", 'name.replace("val_", "val/")', "name"),
        Fault("pictures below one another", "axis=1)", "axis=0)"),
    ],
    "deeplab_fast/training/loop.py": [
        Fault(
            "a resumed run is checked again",
            "workers, check and not resumes)",
            "workers, check)",
            CHECKS,
        ),
        Fault(
            "a run without labels goes on",
            "            run.step.check_labelled(schedule.steps_per_epoch)\n",
            "            pass\n",
            CHECKS,
        ),
        Fault(
            "class weights are counted in the validation data",
            'counts["train"].pixels',
            "[*counts.values()][-1].pixels",
            CHECKS,
        ),
        Fault(
            "the model is returned instead of its average",
            "return state.result.eval()",
            "return state.model.eval()",
        ),
        Fault(
            "the model is evaluated instead of its average",
            "evaluate(state.result, data",
            "evaluate(state.model, data",
        ),
        Fault(
            "evaluated without autocast",
            "dtype=state.dtype, workers=run.workers",
            "workers=run.workers",
        ),
        Fault(
            "the workers of training ignored",
            "state.step, workers, rank, processes)",
            "state.step, 0, rank, processes)",
        ),
        Fault(
            "the workers of evaluation ignored",
            "dtype=state.dtype, workers=run.workers, quiet",
            "dtype=state.dtype, quiet",
        ),
        Fault(
            "not in training mode after an evaluation",
            "        state.train_mode()\n        run.report",
            "        run.report",
        ),
        Fault(
            "a tie replaces the best model",
            "scores.miou > state.best_miou",
            "scores.miou >= state.best_miou",
        ),
        Fault(
            "evaluation counts in images per second",
            "stop = distributed.any_process(stopped.is_set())\n"
            "            report.restart_clock()\n",
            "stop = distributed.any_process(stopped.is_set())\n",
        ),
        Fault(
            "one micro-batch of an update only",
            "for _ in range(run.step.recipe.grad_accum_steps)]",
            "for _ in range(1)]",
        ),
        Fault(
            "workers start at the first update",
            "batches(train_data, recipe, state.step, workers",
            "batches(train_data, recipe, 0, workers",
        ),
        Fault(
            "not saved when stopped",
            "        if schedule.evaluates_after(state.step) or stop:\n",
            "        if schedule.evaluates_after(state.step):\n",
        ),
    ],
    "deeplab_fast/training/report.py": [
        Fault(
            "learning rate of the head logged",
            'state.optimizer.param_groups[0]["lr"]',
            'state.optimizer.param_groups[1]["lr"]',
        ),
        Fault(
            "not in training mode after an evaluation's pictures",
            "pictures)\n        self.state.train_mode()\n",
            "pictures)\n",
        ),
    ],
    "deeplab_fast/training/run_folder.py": [
        Fault(
            "a resume without a run is silent",
            "if resume and not has_checkpoint and distributed.rank() == 0:",
            "if False:",
            CHECKS,
        ),
        Fault(
            "class of the model not compared",
            '            "model": type(model).__name__,\n',
            "",
            Guard("test_training.py deeplabv3plus or another_network"),
        ),
        Fault(
            "the model is saved instead of its average",
            "state.result.save_pretrained(path)",
            "state.model.save_pretrained(path)",
        ),
        Fault(
            "dropout does not depend on the seed",
            "        torch.manual_seed(seed + distributed.rank())\n",
            "",
        ),
        Fault(
            "all processes draw the same dropout",
            "torch.manual_seed(seed + distributed.rank())",
            "torch.manual_seed(seed)",
        ),
        Fault(
            "the random state is not restored",
            "            checkpoint.set_random_state("
            'saved["random"][distributed.rank()], state.device)\n',
            "            pass\n",
        ),
        Fault(
            "all processes restore the random state of rank 0",
            'saved["random"][distributed.rank()]',
            'saved["random"][0]',
        ),
        Fault("resumed with other epochs", "    if recipe.power == 0:\n", "    if True:\n"),
    ],
    "deeplab_fast/training/schedule.py": [
        Fault(
            "evaluated after every epoch",
            "every = self.steps_per_epoch * self.evaluate_every",
            "every = self.steps_per_epoch",
        ),
        Fault(
            "not evaluated at the end",
            "return step % every == 0 or step >= self.num_steps",
            "return step % every == 0",
        ),
        Fault(
            "logged at another interval",
            "step % self.log_every == 0",
            "step % (self.log_every + 1) == 0",
        ),
    ],
    "deeplab_fast/training/signals.py": [
        Fault(
            "signal handlers stay",
            "            signal.signal(number, handler)\n",
            "            pass\n",
        ),
    ],
    "deeplab_fast/training/state.py": [
        Fault(
            "the average is without batch norm's statistics",
            "multi_avg_fn=average, use_buffers=True",
            "multi_avg_fn=average",
        ),
        Fault(
            "the average has the default decay",
            "get_ema_multi_avg_fn(recipe.ema_decay)",
            "get_ema_multi_avg_fn()",
        ),
        Fault(
            "batch norm's parameters are not frozen",
            "                norm.requires_grad_(False)\n",
            "                pass\n",
        ),
        Fault(
            "batch norm's statistics are not frozen",
            "            for norm in _batch_norms(self.model):\n                norm.eval()\n",
            "            pass\n",
        ),
        Fault("no autocast", "enabled=self.dtype != torch.float32)", "enabled=False)"),
        Fault(
            "the weights are not restored",
            '        self.model.load_state_dict(state["model"])\n',
            "",
        ),
        Fault(
            "the average is not restored",
            '            self.average.load_state_dict(state["average"])\n',
            "            pass\n",
        ),
        Fault(
            "the momentum is not restored",
            '        self.optimizer.load_state_dict(state["optimizer"])\n',
            "",
        ),
        Fault(
            "the loss scale is not restored",
            '        self.scaler.load_state_dict(state["scaler"])\n',
            "",
        ),
        Fault(
            "the update is not restored",
            "        for name in _PROGRESS:\n            setattr",
            "        for name in _PROGRESS[1:]:\n            setattr",
        ),
        Fault(
            "the last evaluation is not restored",
            "        for name in _PROGRESS:\n            setattr",
            '        for name in ("step", "loss", "best_miou"):\n            setattr',
        ),
        Fault(
            "the loss is not restored",
            "        for name in _PROGRESS:\n            setattr",
            '        for name in ("step", "evaluated", "best_miou"):\n            setattr',
        ),
        Fault(
            "the best score is not restored",
            "        for name in _PROGRESS:\n            setattr",
            "        for name in _PROGRESS[:3]:\n            setattr",
        ),
    ],
    "deeplab_fast/training/step.py": [
        Fault(
            "part of an epoch must have labels",
            "        if self.updates < least:\n            return\n",
            "",
            CHECKS,
        ),
        Fault(
            "labels of earlier epochs count",
            "        self.label_weight.zero_()\n",
            "",
            CHECKS,
        ),
        Fault(
            "the average is one update late",
            "        state.scaler.step(state.optimizer)\n"
            "        state.scaler.update()\n"
            "        state.optimizer.zero_grad(set_to_none=True)\n"
            "        if state.average is not None:\n"
            "            state.average.update_parameters(state.model)\n",
            "        if state.average is not None:\n"
            "            state.average.update_parameters(state.model)\n"
            "        state.scaler.step(state.optimizer)\n"
            "        state.scaler.update()\n"
            "        state.optimizer.zero_grad(set_to_none=True)\n",
        ),
        Fault(
            "learning rates are not set",
            "        self.recipe.set_learning_rates(state.optimizer, state.step, self.num_steps)\n",
            "",
        ),
        Fault(
            "gradients are not cleared", "        state.optimizer.zero_grad(set_to_none=True)\n", ""
        ),
        Fault("the loss is not scaled", "state.scaler.scale(loss).backward()", "loss.backward()"),
        Fault("the loss scale never changes", "        state.scaler.update()\n", ""),
        Fault(
            "all micro-batches divided by the weight of the first",
            "torch.stack(normalizers).sum()",
            "normalizers[0].clone()",
        ),
        Fault(
            "the loss logged is of the last micro-batch",
            "total += loss.detach()",
            "total = loss.detach()",
        ),
        Fault(
            "images not divided by the standard deviation",
            "/ 255 - self.mean) / self.std",
            "/ 255 - self.mean)",
        ),
    ],
    "deeplab_fast/training/metrics.py": [
        Fault(
            "one class in the ground truth is taken for one prediction",
            "if len(predicted) == 1 < len(present) else None",
            "if len(predicted) == 1 else None",
            CHECKS,
        ),
        Fault(
            "rows and columns exchanged",
            "target[counts].long() * num_classes + prediction[counts].long()",
            "prediction[counts].long() * num_classes + target[counts].long()",
        ),
        Fault(
            "the intersection twice in the union",
            "self.confusion.sum(0) + self.confusion.sum(1) - hits",
            "self.confusion.sum(0) + self.confusion.sum(1)",
        ),
        Fault(
            "precision for accuracy",
            "_divide(np.diag(self.confusion), self.confusion.sum(1))",
            "_divide(np.diag(self.confusion), self.confusion.sum(0))",
        ),
        Fault(
            "absent classes count as 0",
            "known = values[~np.isnan(values)]",
            "known = np.nan_to_num(values)",
        ),
        Fault(
            "frequency of predictions",
            "frequency = _divide(self.confusion.sum(1), self.confusion.sum())",
            "frequency = _divide(self.confusion.sum(0), self.confusion.sum())",
        ),
    ],
    "deeplab_fast/training/objective.py": [
        Fault(
            "weight of the auxiliary loss ignored",
            "self.recipe.aux_weight * self._loss",
            "0.5 * self._loss",
        ),
        Fault(
            "class weights ignored",
            "None if weights is None else torch.tensor(weights),",
            "None if weights is None else torch.ones(len(weights)),",
        ),
        Fault(
            "divided by the number of pixels",
            "        return weight[target.where(counts, 0)].where(counts, 0).sum()",
            "        return counts.sum(dtype=torch.float32)",
        ),
        Fault(
            "ignored pixels count",
            "return counts.sum(dtype=torch.float32)",
            "return (target >= 0).sum(dtype=torch.float32)",
        ),
        Fault(
            "label smoothing ignored",
            "label_smoothing=recipe.label_smoothing,",
            "label_smoothing=0.0,",
        ),
        Fault(
            "align_corners ignored",
            "align_corners=model.align_corners,",
            "align_corners=False,",
        ),
        Fault(
            "top_k_pixels ignored",
            "int(fraction * target.numel())",
            "int(0.25 * target.numel())",
        ),
        Fault(
            "top-k losses of all micro-batches add up",
            "values.mean() / self.recipe.grad_accum_steps",
            "values.mean()",
        ),
    ],
    "deeplab_fast/training/recipe.py": [
        Fault(
            "no warm-up",
            "warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0",
            "warmup = 1.0",
        ),
        Fault("warm-up starts at 0", "(step + 1) / self.warmup_steps", "step / self.warmup_steps"),
        Fault("power ignored", "(1 - step / steps) ** self.power", "(1 - step / steps) ** 0.9"),
        Fault("momentum ignored", "momentum=self.momentum, ", "momentum=0.9, "),
        Fault("weight decay ignored", "weight_decay=self.weight_decay)", "weight_decay=1e-4)"),
        Fault(
            "Nesterov's momentum",
            "weight_decay=self.weight_decay)",
            "weight_decay=self.weight_decay, nesterov=self.momentum > 0)",
        ),
        Fault(
            "learning rate of the head ignored",
            "head_learning_rate = self.head_learning_rate or self.learning_rate",
            "head_learning_rate = self.learning_rate",
        ),
        Fault(
            "backbone and head exchanged",
            '(backbone if name.startswith("backbone.") else head)',
            '(head if name.startswith("backbone.") else backbone)',
        ),
        Fault(
            "learning rates multiply up",
            'group["lr"] = group["initial_lr"] * factor',
            'group["lr"] = group["lr"] * factor',
        ),
    ],
    "deeplab_fast/training/transforms.py": [
        Fault(
            "never enlarged",
            "random.uniform(*recipe.scale)",
            "random.uniform(recipe.scale[0], 1.0)",
        ),
        Fault(
            "the last crop never taken",
            "random.integers(whole - part + 1)",
            "random.integers(max(1, whole - part))",
        ),
        Fault(
            "never darker",
            "random.uniform(1 - recipe.color_jitter, 1 + recipe.color_jitter)",
            "random.uniform(1, 1 + recipe.color_jitter)",
        ),
        Fault(
            "no change of saturation",
            "ImageEnhance.Contrast, ImageEnhance.Color",
            "ImageEnhance.Contrast, ImageEnhance.Contrast",
        ),
        Fault(
            "labels interpolated", "Image.Resampling.NEAREST, box", "Image.Resampling.BILINEAR, box"
        ),
        Fault(
            "images not interpolated",
            "image = image.resize(size, Image.Resampling.BILINEAR, box)",
            "image = image.resize(size, Image.Resampling.NEAREST, box)",
        ),
        Fault(
            "padding is class 0",
            'Image.new("L", (width, height), IGNORE)',
            'Image.new("L", (width, height), 0)',
        ),
        Fault(
            "probability of mirroring ignored",
            "random.random() < recipe.flip",
            "random.random() < 0.5",
        ),
        Fault(
            "mirrored where the probability is 0",
            "random.random() < recipe.flip",
            "random.random() <= recipe.flip",
        ),
        Fault(
            "labels not mirrored",
            "pixels, classes = pixels[:, ::-1], classes[:, ::-1]",
            "pixels = pixels[:, ::-1]",
        ),
    ],
}
