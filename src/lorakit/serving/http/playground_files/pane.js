// One pane: a model or a blend, its conversation, and the answer that it computes now.

import { ApiError, classify, stream } from "./api.js";
import { showTokens } from "./tokens.js";

export const BLEND = " blend"; // no adapter's name starts with a blank
const UNKNOWN_TASKS = [null, undefined, "CAUSAL_LM"]; // of PEFT's files, which do not say what the prompts were
const LARGEST_WEIGHT = 2;
const WAIT = 350; // milliseconds after a slider moved until the answer is computed again

const template = document.getElementById("pane-template");

/** Return an element with these properties and children. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** The adapters in a receipt such as base=0123;name=4567*0.5, by name. */
function adaptersOf(fingerprint) {
  const parts = fingerprint.split(";").slice(1).map((part) => part.split("="));
  return Object.fromEntries(
    parts.map(([name, rest]) => {
      const [digest, weight] = rest.split("*");
      return [decodeURIComponent(name), { digest, weight: weight === undefined ? 1 : Number(weight) }];
    }),
  );
}

/** Return the kind of prompt that an adapter was trained on, chat or text; undefined if its files do not say. */
export function trainedOn({ details }) {
  if (UNKNOWN_TASKS.includes(details.task)) return undefined;
  return details.task === "chat" ? "chat" : "text";
}

export class Pane {
  /**
   * @param page What all panes share: models(), adapters(), base(), kind(), limits(), blends(), settings(), changed(), edit(index), showCard(pane), showCode(pane),
   *   remove(pane), say(text), began(), ended(pane).
   * @param choice {model: name}, or {blend: {name: weight}}.
   */
  constructor(page, choice) {
    this.page = page;
    this.threads = { chat: [], text: [] }; // of {user, answer}; answer is {text, tokens, seed, fingerprint, ...}
    this.running = null;
    this.rendered = null; // the turns that the log shows
    this.letter = null; // in a blind vote, what the pane is called
    this.node = template.content.firstElementChild.cloneNode(true);
    const find = (name) => this.node.querySelector(name);
    this.select = find(".model");
    this.log = find(".log");
    this.figures = find(".figures");
    this.alert = find(".alert");
    this.blendPlace = find(".blend");
    this.stopButton = find(".stop");
    this.againButton = find(".again");
    this.select.addEventListener("change", () => this.#select());
    this.stopButton.addEventListener("click", () => this.stop());
    this.againButton.addEventListener("click", () => this.again());
    find(".code").addEventListener("click", () => page.showCode(this));
    find(".card").addEventListener("click", () => page.showCard(this));
    find(".remove").addEventListener("click", () => page.remove(this));
    this.choose(choice);
    this.render();
  }

  /** The turns of the kind of prompt that is chosen now. */
  get turns() {
    return this.threads[this.page.settings().mode];
  }

  set turns(turns) {
    this.threads[this.page.settings().mode] = turns;
  }

  // --- what is chosen ---------------------------------------------------------------------------------

  choose(choice) {
    this.model = choice.blend ? BLEND : choice.model;
    this.blend = { ...(choice.blend ?? {}) };
    this.showModels();
  }

  get choice() {
    return this.model === BLEND ? { blend: this.blend } : { model: this.model };
  }

  /** Name of the pane for people. */
  get name() {
    if (this.letter) return `Model ${this.letter}`;
    if (this.model !== BLEND) return this.model;
    return Object.entries(this.blend).map(([name, weight]) => `${name} × ${weight}`).join(" + ") || "empty blend";
  }

  /** The weights of the adapters that act. */
  get weights() {
    if (this.model !== BLEND) return this.model === this.page.base() ? {} : { [this.model]: 1 };
    return Object.fromEntries(Object.entries(this.blend).filter(([, weight]) => weight !== 0));
  }

  /** Fill the list of models, with a model that is gone marked. */
  showModels() {
    const names = this.page.models().map((model) => model.id);
    const known = names.includes(this.model) || this.model === BLEND;
    const options = names.map((name) => new Option(name === this.page.base() ? `${name} (base)` : name, name));
    if (!known) options.push(new Option(`${this.model} (not served)`, this.model));
    if (this.page.blends() || this.model === BLEND) options.push(new Option("Blend of adapters …", BLEND));
    this.select.replaceChildren(...options);
    this.select.value = this.model;
    this.showBlend();
    this.#showHint();
  }

  #select() {
    const before = this.weights;
    this.model = this.select.value;
    if (this.model === BLEND && !Object.keys(this.blend).length) {
      const adapters = this.page.adapters();
      const first = Object.keys(before)[0] ?? adapters[0];
      const second = adapters.find((name) => name !== first);
      this.blend = { [first]: second ? 0.5 : 1, ...(second ? { [second]: 0.5 } : {}) };
    }
    this.showBlend();
    this.#showHint();
    this.page.changed();
    this.#sameSeed();
  }

  showBlend() {
    this.blendPlace.hidden = this.model !== BLEND || this.letter !== null;
    if (this.blendPlace.hidden) return this.blendPlace.replaceChildren();
    const controls = () => [...this.blendPlace.querySelectorAll("select, input, button")];
    const focused = controls().indexOf(document.activeElement);
    const adapters = this.page.adapters();
    const rows = Object.keys(this.blend).map((name) => this.#blendRow(name, adapters));
    const unused = adapters.filter((name) => !(name in this.blend));
    const add = element("button", { type: "button", className: "plain", textContent: "Add adapter" });
    add.hidden = !unused.length || rows.length >= Math.min(3, this.page.limits().max_blend);
    add.addEventListener("click", () => this.#changeBlend({ ...this.blend, [unused[0]]: 0.5 }));
    this.blendPlace.replaceChildren(...rows, add);
    // The focus stays at its position: after adding on the new row, and without a usable control there on one before.
    controls().slice(0, focused + 1).reverse().find((control) => !control.disabled && !control.hidden)?.focus();
  }

  #blendRow(name, adapters) {
    const select = element("select", { ariaLabel: "Adapter of the blend" });
    const offered = adapters.filter((other) => other === name || !(other in this.blend));
    select.append(...(offered.includes(name) ? offered : [name, ...offered]).map((other) => new Option(other, other)));
    select.value = name;
    select.addEventListener("change", () => {
      const entries = Object.entries(this.blend).map(([key, weight]) => [key === name ? select.value : key, weight]);
      this.#changeBlend(Object.fromEntries(entries));
    });
    const slider = element("input", { type: "range", min: 0, max: LARGEST_WEIGHT, step: 0.05, value: this.blend[name] });
    slider.ariaLabel = `Weight of ${name}`;
    const shown = element("output", { textContent: this.blend[name].toFixed(2) });
    slider.addEventListener("input", () => {
      this.blend[name] = Number(slider.value);
      shown.textContent = this.blend[name].toFixed(2);
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.#sameSeed(), WAIT);
    });
    slider.addEventListener("change", () => this.page.changed());
    const remove = element("button", { type: "button", className: "plain", textContent: "×", ariaLabel: `Remove ${name}` });
    remove.disabled = Object.keys(this.blend).length === 1;
    remove.addEventListener("click", () => {
      const { [name]: _, ...rest } = this.blend;
      this.#changeBlend(rest);
    });
    return element("div", { className: "part" }, select, slider, shown, remove);
  }

  #changeBlend(blend) {
    this.blend = blend;
    this.showBlend();
    this.page.changed();
    this.#sameSeed();
  }

  /** Compute the last answer again with its seed, so that it can be compared with the other panes'. */
  #sameSeed() {
    if (this.turns.length) this.#answer(this.turns.at(-1).answer?.seed ?? this.page.newSeed());
  }

  // --- requests ---------------------------------------------------------------------------------------

  /** Return the request for the answer to a turn, as {path, body}. */
  request(index, settings, seed) {
    const isBlend = this.model === BLEND;
    const weights = this.weights;
    const body = { model: isBlend ? this.page.base() : this.model };
    if (isBlend && Object.keys(weights).length) body.lora = weights;
    if (this.page.kind() !== "text") return { path: "v1/classify", body: { ...body, input: this.turns[index].user } };
    const colours = settings.colours;
    body.temperature = settings.temperature;
    if (settings.top_p < 1) body.top_p = settings.top_p;
    if (settings.top_k > 0) body.top_k = settings.top_k;
    if (settings.stop) body.stop = [settings.stop];
    body.seed = seed;
    body.stream = true;
    body.stream_options = { include_usage: true };
    if (colours && this.page.hasBase() && Object.keys(weights).length) body.base_logprobs = true;
    if (settings.mode === "text") {
      body.prompt = this.turns[index].user;
      body.max_tokens = settings.max_tokens;
      if (body.base_logprobs) body.logprobs = 0;
      return { path: "v1/completions", body };
    }
    body.messages = settings.system ? [{ role: "system", content: settings.system }] : [];
    for (const { user, answer } of this.turns.slice(0, index).filter(isWhole)) {
      body.messages.push({ role: "user", content: user }, { role: "assistant", content: answer.text });
    }
    body.messages.push({ role: "user", content: this.turns[index].user });
    body.max_completion_tokens = settings.max_tokens;
    if (body.base_logprobs) body.logprobs = true;
    return { path: "v1/chat/completions", body };
  }

  /** Ask for an answer to a new message, after the first `kept` turns. */
  ask(user, kept, seed) {
    this.turns = [...this.turns.slice(0, kept), { user, answer: null }];
    return this.#answer(seed);
  }

  /** Compute the last answer again: with another seed, unless one is set. */
  again() {
    if (!this.turns.length) return;
    this.#answer(this.page.settings().seed ?? this.page.newSeed());
  }

  stop() {
    this.running?.abort();
  }

  get isRunning() {
    return this.running !== null;
  }

  async #answer(seed) {
    clearTimeout(this.timer);
    this.running?.abort();
    const controller = new AbortController();
    this.running = controller;
    this.page.began();
    const index = this.turns.length - 1;
    const { colours, max_tokens: most } = this.page.settings();
    const answer = { text: "", tokens: [], seed, most, fingerprint: "", figures: null, error: null, scores: null, ended: "" };
    this.turns[index].answer = answer;
    this.render();
    const place = this.log.querySelector(".turn:last-child .answer");
    try {
      await this.#read(index, answer, seed, place, controller.signal);
    } catch (error) {
      if (error.name === "AbortError") answer.ended = "stopped";
      else {
        answer.error = error.message;
        if (error instanceof ApiError && [401, 404].includes(error.status)) this.page.refresh(error.status);
      }
    }
    if (this.running !== controller) return; // another answer has begun
    this.running = null;
    const isRecoloured = this.page.settings().colours !== colours; // the earlier turns too
    this.render(isRecoloured ? 0 : Math.max(0, this.turns.length - 1));
    this.page.ended(this);
  }

  async #read(index, answer, seed, place, signal) {
    const { path, body } = this.request(index, this.page.settings(), seed);
    const began = performance.now();
    if (path === "v1/classify") {
      const found = await classify(body, signal);
      answer.scores = found.data[0].label === null ? { score: found.data[0].score } : found.data[0].scores;
      answer.fingerprint = found.system_fingerprint;
      this.#check(answer.fingerprint);
      answer.figures = { seconds: (performance.now() - began) / 1000 };
      return;
    }
    let first = 0;
    let last = 0;
    let chunks = 0;
    for await (const event of stream(path, body, signal)) {
      if (!answer.fingerprint) {
        answer.fingerprint = event.system_fingerprint;
        this.#check(answer.fingerprint);
      }
      const choice = event.choices[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      if (text) {
        last = performance.now();
        first ||= last;
        chunks += 1;
        const { isAtEnd } = this;
        answer.text += text;
        place.append(text);
        if (isAtEnd) this.log.scrollTop = this.log.scrollHeight;
        answer.figures = figures(began, first, last, chunks);
        this.showFigures();
      }
      answer.tokens.push(...tokensOf(choice?.logprobs));
      if (choice?.finish_reason) answer.ended = choice.finish_reason;
      choice?.base_logprobs?.forEach((value, i) => {
        answer.tokens[i].base = value;
      });
      if (event.usage) answer.figures = figures(began, first || performance.now(), last, event.usage.completion_tokens);
    }
  }

  /** Compare what computed the answer with what this pane asked for. */
  #check(fingerprint) {
    const expected = this.weights;
    const found = adaptersOf(fingerprint);
    const names = Object.keys(found);
    const same =
      names.length === Object.keys(expected).length &&
      names.every((name) => name in expected && Math.abs(found[name].weight - expected[name]) < 1e-6);
    if (same) return;
    const wanted = Object.keys(expected).join(", ") || "the base alone";
    throw new ApiError(
      `The receipt of this answer names ${names.join(", ") || "the base alone"}, not ${wanted}. Do not trust it.`,
    );
  }

  // --- what is shown ----------------------------------------------------------------------------------

  /** Whether the reader sees the end of the answers, and has not scrolled up. */
  get isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
  }

  /** Show the pane again. Turns before number `first` stay as they are, with what the reader selected in them. */
  render(first = 0) {
    const { scrollTop } = this.log;
    const followsEnd = this.isAtEnd || this.isRunning || this.rendered !== this.turns;
    this.rendered = this.turns;
    const isBlind = this.letter !== null;
    this.node.setAttribute("aria-label", this.name);
    this.node.querySelector("h2").textContent = this.name;
    this.node.querySelector("h2").className = isBlind ? "" : "hidden";
    this.node.querySelector(".choice").classList.toggle("blind", isBlind);
    for (const name of [".model", ".card", ".code", ".again"]) this.node.querySelector(name).hidden = isBlind;
    if (isBlind) this.blendPlace.hidden = true;
    const turns = this.turns.slice(first).map((turn, index) => this.#turn(turn, first + index));
    const empty = element("p", { className: "empty", textContent: "No answer yet." });
    for (const node of [...this.log.children].slice(first)) node.remove();
    this.log.append(...(turns.length ? turns : [empty]));
    this.log.setAttribute("aria-label", `Answers of ${this.name}`);
    this.log.setAttribute("aria-busy", String(this.isRunning));
    const error = this.turns.at(-1)?.answer?.error;
    this.alert.hidden = !error;
    this.alert.textContent = error ?? "";
    this.stopButton.disabled = !this.isRunning;
    this.againButton.disabled = !this.turns.length;
    this.#showHint();
    this.showFigures();
    this.log.scrollTop = followsEnd ? this.log.scrollHeight : scrollTop; // once everything around it has its size
  }

  /** Say so if an adapter was trained on the other kind of prompt. */
  #showHint() {
    const { mode } = this.page.settings();
    const adapters = this.page.models().filter((model) => model.id in this.weights);
    const isOther = (model) => ![undefined, mode].includes(trainedOn(model));
    const found = this.page.kind() === "text" && this.letter === null && adapters.find(isOther);
    const hint = this.node.querySelector(".hint");
    hint.hidden = !found;
    if (!found) return;
    hint.textContent = {
      chat: `${found.id} was trained on texts, not on chats. Choose “Continue a text” below.`,
      text: `${found.id} was trained on chats. Choose “Chat” below.`,
    }[mode];
  }

  #turn({ user, answer }, index) {
    const { mode } = this.page.settings();
    const isText = mode === "text" && this.page.kind() === "text";
    const isLast = index === this.turns.length - 1;
    const isWaiting = isLast && this.isRunning;
    const node = element("div", { className: "turn" });
    const place = element(isText ? "span" : "div", { className: "answer" });
    if (isText) {
      // One direction for both: the answer continues the text.
      node.append(element("div", { dir: "auto" }, element("span", { className: "given", textContent: user }), place));
    } else {
      place.dir = "auto";
      const edit = element("button", { type: "button", className: "plain", textContent: "Edit" });
      edit.ariaLabel = `Edit message ${index + 1}`;
      edit.addEventListener("click", () => this.page.edit(index, user));
      node.append(element("div", { className: "user" }, element("p", { dir: "auto", textContent: user }), edit), place);
    }
    const note = (text) => node.append(element("p", { className: "note", textContent: text }));
    if (answer) this.#showAnswer(place, answer, isWaiting);
    if (isWaiting) return node;
    if (answer?.error && !isLast && this.letter === null) note(answer.error); // the last one is the pane's alert
    const cut = answer && `Cut off after ${answer.most} tokens: see “Most new tokens” in Settings.`;
    const ended = { length: cut, stopped: "Stopped." }[answer?.ended];
    if (ended) note(ended);
    else if (answer && !answer.text && !answer.scores && !answer.error) note("The answer is empty.");
    const isChat = mode === "chat" && this.page.kind() === "text";
    if (isChat && !isWhole(this.turns[index])) note("Later messages are sent without this message and its answer.");
    return node;
  }

  #showAnswer(place, answer, isWaiting) {
    const coloured = answer.tokens.length && answer.tokens.every((token) => token.base !== undefined);
    if (answer.scores) place.append(bars(answer.scores));
    else if (coloured && this.page.settings().colours && this.letter === null && !isWaiting) {
      showTokens(place, answer, this.name);
    } else place.textContent = answer.text;
    place.classList.toggle("waiting", isWaiting);
  }

  showFigures() {
    const answer = this.turns.at(-1)?.answer;
    const { figures: found } = answer ?? {};
    this.figures.textContent = "";
    this.figures.title = "";
    if (!found || this.letter !== null) return;
    const parts = [];
    if (found.tokens !== undefined) parts.push(`${found.tokens} tokens`);
    if (found.rate) parts.push(`${found.rate.toFixed(1)} tokens/s`);
    parts.push(found.first === undefined ? `${found.seconds.toFixed(2)} s` : `first after ${found.first.toFixed(2)} s`);
    if (!this.isRunning && found.tokens !== undefined) parts.push(`seed ${answer.seed}`);
    this.figures.textContent = parts.join(" · ");
    this.figures.title = answer.fingerprint ? `Receipt: ${answer.fingerprint}` : "";
  }
}

/** Whether later messages are sent with this turn: an error, or Stop before the first text, may have cut its answer. */
function isWhole({ answer }) {
  return answer?.error === null && (answer.text !== "" || answer.ended !== "stopped");
}

function figures(began, first, last, tokens) {
  const seconds = (last - first) / 1000;
  return { tokens, first: (first - began) / 1000, rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0 };
}

/** The tokens of a chunk, in the form of chats or of completions. */
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) return logprobs.content.map(({ token, logprob }) => ({ text: token, logprob }));
  return logprobs.tokens.map((text, i) => ({ text, logprob: logprobs.token_logprobs[i] }));
}

function bars(scores) {
  const rows = Object.entries(scores).flatMap(([label, score]) => {
    const isShare = label !== "score";
    const meter = element("meter", { min: 0, max: 1, value: score, ariaLabel: label });
    const shown = isShare ? `${(100 * score).toFixed(1)} %` : score.toFixed(3);
    return [
      element("dt", { textContent: label }),
      element("dd", {}, isShare ? meter : ""),
      element("dd", { textContent: shown }),
    ];
  });
  return element("dl", { className: "bars" }, ...rows);
}
