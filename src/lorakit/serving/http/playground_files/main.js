// The page: its panes, its settings, and what people do with them.

import { ApiError, hasKey, listModels, readReport, reportPath, setKey } from "./api.js";
import { code } from "./code.js";
import { BLEND, element, Pane, trainedOn } from "./pane.js";
import { exported, forgetTally, fromHash, imported, MOST_PANES, readTally, toHash, vote } from "./session.js";
import { watchTokens } from "./tokens.js";

const LETTERS = "ABCD";
const LONGEST_SHARED = 2000; // characters of a prompt in the address
const DEFAULTS = { mode: "chat", temperature: 0.7, top_p: 1, top_k: 0, max_tokens: 256, seed: null, stop: "", system: "" };
const FIELDS = ["temperature", "top_p", "top_k", "max_tokens", "seed", "stop", "system"];

const at = (id) => document.getElementById(id);
const prompt = at("prompt");

let models = [];
let panes = [];
let started = false; // whether the panes and settings of the address are there
let edited = null; // number of turns that stay when an earlier message is edited
let draft = ""; // what the prompt held before the edit
let settings = { ...DEFAULTS, colours: true };
let coded = null; // the pane whose request is shown as code

/** The base's entry in the list of models, if there is one. */
function base() {
  return models.find((model) => model.parent === null);
}

// --- what the panes use ------------------------------------------------------------------------------

const page = {
  models: () => models,
  adapters: () => models.filter((model) => model.parent !== null).map((model) => model.id),
  base: () => base()?.id ?? models[0]?.parent ?? "",
  hasBase: () => base() !== undefined, // not with a key that may use adapters only
  kind: () => models[0]?.details.kind ?? "text",
  limits: () => models[0]?.details.limits ?? { max_blend: 8, max_tokens: 4096 },
  blends: () => page.hasBase() && page.adapters().length > 0 && page.kind() === "text", // a blend is a request to the base
  settings: () => settings,
  newSeed: () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000,
  say(text) {
    at("status").textContent = text;
  },
  changed() {
    keepAddress();
    showButtons();
  },
  edit(index, text) {
    if (edited === null) draft = prompt.value;
    edited = index;
    prompt.value = text;
    at("editing").hidden = false;
    prompt.focus();
  },
  remove(pane) {
    pane.stop();
    const position = panes.indexOf(pane);
    panes = panes.filter((other) => other !== pane);
    pane.node.remove();
    page.changed();
    (panes[Math.min(position, panes.length - 1)]?.select ?? at("add-pane")).focus();
  },
  began: showButtons,
  ended(pane) {
    const answer = pane.turns.at(-1)?.answer;
    const how = answer?.error ? "has an error" : answer?.ended === "stopped" ? "was stopped" : "has finished";
    page.say(`${pane.name} ${how}.`);
    showButtons();
    askForVote();
  },
  async refresh(status) {
    if (status === 401) return askForKey();
    await readModels().catch(() => {});
  },
  showCard,
  showCode(pane) {
    coded = pane;
    showCode("curl");
    at("code-dialog").showModal();
  },
};

// --- start -------------------------------------------------------------------------------------------

/** Read the models, and at the first success open what the address names. */
async function start() {
  try {
    await readModels();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return askForKey();
    if (!started) at("send").disabled = false; // it calls this function again
    return notice(started ? error.message : `${error.message} Send to try again.`);
  }
  if (started) return;
  started = true;
  notice("");
  const found = addressed();
  prompt.value ||= found.prompt; // what was typed while the page loaded stays
  openState(found);
  if (!page.adapters().length) notice("This server has no adapter yet. Train one with lorakit train, or see lorakit demo.");
}

/** Return the panes, settings and prompt of the address, with the usual panes if it names none. */
function addressed() {
  const found = fromHash(location.hash);
  const usual = models.filter((model) => !model.details.error && (model.parent !== null || page.kind() === "text")).slice(0, 3);
  const choices = found.panes.length ? found.panes : usual.map((model) => ({ model: model.id }));
  return { ...found, panes: choices.map((choice) => ({ choice })) };
}

/** Open the panes and settings of an address or a session. A setting that it does not have is the usual one. */
function openState({ panes: found, settings: chosen }) {
  const kinds = models.filter((model) => model.parent !== null).map(trainedOn);
  const isChat = models.some((model) => model.details.chat) && !(kinds.length && kinds.every((kind) => kind === "text"));
  settings = { ...settings, ...DEFAULTS, mode: isChat ? "chat" : "text", ...chosen };
  settings.max_tokens = Math.min(settings.max_tokens, page.limits().max_tokens);
  setPanes(found);
  showSettings();
}

async function readModels() {
  const found = await listModels();
  const offered = (list) => JSON.stringify(list.map(({ id, parent, details: { task } }) => [id, parent, task]));
  const isOther = offered(found) !== offered(models);
  models = found;
  const details = base()?.details ?? {};
  const count = page.adapters().length;
  const facts = [page.base(), details.dtype, details.engine && `${details.engine} engine`, `${count} adapter${count === 1 ? "" : "s"}`];
  at("base-facts").textContent = facts.filter(Boolean).join(" · ");
  at("base-facts").title = details.notice ?? "";
  if (isOther) for (const pane of panes) pane.showModels(); // else lists and sliders in use stay as they are
}

function setPanes(found) {
  for (const pane of panes) pane.stop();
  panes = found.map(({ choice, threads }) => {
    const pane = new Pane(page, choice);
    if (threads) pane.threads = threads;
    pane.render();
    return pane;
  });
  at("panes").replaceChildren(...panes.map((pane) => pane.node));
  hideVote();
  showButtons();
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

// --- settings ----------------------------------------------------------------------------------------

function showSettings() {
  const isText = page.kind() === "text";
  for (const name of FIELDS) at(name).value = settings[name] ?? "";
  at("max_tokens").max = page.limits().max_tokens;
  at("colours").checked = settings.colours;
  document.querySelector(`[name=mode][value=${settings.mode}]`).checked = true;
  at("system-field").hidden = settings.mode === "text";
  document.querySelector(".modes").hidden = !isText;
  at("settings").hidden = !isText;
  at("legend").hidden = !isText || !settings.colours;
  const label = { chat: "Message", text: "Text to continue" }[settings.mode];
  at("prompt-label").textContent = isText ? label : "Text to classify";
  prompt.placeholder = isText ? { chat: "Write a message", text: "Write the start of a text. Ctrl+Enter continues it." }[settings.mode] : "Write a text to classify";
  at("send").textContent = isText ? { chat: "Send", text: "Continue" }[settings.mode] : "Classify";
}

/** Whether a field's value counts. The step of a fraction is for the arrow keys only, so aria-invalid is false there. */
function isValid({ step, validity: { valid, stepMismatch, rangeUnderflow, rangeOverflow } }) {
  return valid || (stepMismatch && step < 1 && !rangeUnderflow && !rangeOverflow);
}

/** Read a field. One that is not valid goes back to what counts, and a note says so without taking the focus. */
function readField(name) {
  const field = at(name);
  if (!isValid(field)) {
    const label = field.parentElement.firstChild.textContent.trim();
    at("settings-note").textContent = `${label}: ${field.validationMessage} It stays ${settings[name] ?? "random"}.`;
    field.value = settings[name] ?? "";
    return;
  }
  at("settings-note").textContent = "";
  if (field.type !== "number") settings[name] = field.value;
  else if (field.value !== "") settings[name] = Number(field.value);
  else {
    settings[name] = DEFAULTS[name];
    field.value = settings[name] ?? "";
  }
  page.changed();
}

for (const name of FIELDS) at(name).addEventListener("change", () => readField(name));
at("colours").addEventListener("change", () => {
  settings.colours = at("colours").checked;
  showSettings();
  for (const pane of panes) if (!pane.isRunning) pane.render();
});
for (const radio of document.querySelectorAll("[name=mode]")) {
  radio.addEventListener("change", () => {
    for (const pane of panes) pane.stop();
    endEdit();
    settings.mode = radio.value;
    for (const pane of panes) pane.render(); // each kind of prompt has its own turns
    showSettings();
    page.changed();
  });
}

function keepAddress() {
  if (!started) return;
  const choices = panes.map((pane) => pane.choice);
  // In a blind vote the order of the panes would tell the names of their models.
  if (panes.some((pane) => pane.letter !== null)) choices.sort((a, b) => (JSON.stringify(a) < JSON.stringify(b) ? -1 : 1));
  const text = prompt.value.length <= LONGEST_SHARED ? prompt.value : "";
  const state = { panes: choices, settings, prompt: text };
  try {
    history.replaceState(null, "", toHash(state));
  } catch {
    // Safari allows 100 changes in 30 seconds. The next change writes this one too.
  }
}

// --- sending -----------------------------------------------------------------------------------------

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (panes.some((pane) => pane.isRunning)) {
    notice("The last answers are still being computed. Stop them first.");
    return;
  }
  if (!started) return start();
  if (!panes.length) {
    notice("There is no model to ask. Choose “Add model” first.");
    return;
  }
  const text = prompt.value;
  const isEmpty = settings.mode === "text" && page.kind() === "text" ? text === "" : text.trim() === "";
  if (isEmpty) {
    notice("Write something first.");
    prompt.focus();
    return;
  }
  notice("");
  keepAddress();
  const isChat = settings.mode === "chat" && page.kind() === "text";
  const kept = isChat ? (edited ?? Math.max(...panes.map((pane) => pane.turns.length))) : 0;
  if (isChat) prompt.value = "";
  endEdit();
  const seed = settings.seed ?? page.newSeed();
  beginBlind();
  for (const pane of panes) pane.ask(text, kept, seed);
  page.say("Computing the answers.");
});

prompt.addEventListener("keydown", (event) => {
  if (event.isComposing || event.keyCode === 229) return; // 229: in Safari, the Enter that ends a composition
  const sends = settings.mode === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && sends) {
    event.preventDefault();
    at("composer").requestSubmit();
  }
});
prompt.addEventListener("change", keepAddress);

/** End the edit of an earlier message, and put back what the prompt held before it. */
function endEdit() {
  if (edited === null) return;
  prompt.value = draft;
  edited = null;
  at("editing").hidden = true;
}

at("cancel-edit").addEventListener("click", () => {
  endEdit();
  prompt.focus();
});
at("clear").addEventListener("click", () => {
  endEdit();
  for (const pane of panes) {
    pane.stop();
    pane.turns = [];
    pane.letter = null;
    pane.showBlend();
    pane.render();
  }
  hideVote();
  showButtons();
  prompt.value = "";
  keepAddress();
  prompt.focus();
});
at("stop-all").addEventListener("click", () => {
  for (const pane of panes) pane.stop();
});
at("add-pane").addEventListener("click", () => {
  const shown = panes.map((pane) => pane.model);
  const model = models.map(({ id }) => id).find((id) => !shown.includes(id));
  // Where every model is shown already, half of an adapter is the next thing to compare.
  const choice = !model && page.blends() ? { blend: { [page.adapters()[0]]: 0.5 } } : { model: model ?? models[0].id };
  const pane = new Pane(page, choice);
  // The new pane joins the conversation of the others at their last message.
  const turns = panes[0]?.turns ?? [];
  pane.turns = turns.map(({ user }) => ({ user, answer: null }));
  panes.push(pane);
  at("panes").append(pane.node);
  page.changed();
  pane.select.focus();
  if (turns.length) pane.again();
});

function showButtons() {
  const running = panes.some((pane) => pane.isRunning);
  at("stop-all").disabled = !running;
  at("send").disabled = !panes.length;
  at("add-pane").disabled = panes.length >= MOST_PANES || !models.length;
}

// --- blind vote --------------------------------------------------------------------------------------

/** Shuffle the panes and hide their names, if the vote is on. */
function beginBlind() {
  hideVote();
  const isBlind = at("blind").checked && panes.length > 1;
  if (isBlind) {
    for (let i = panes.length - 1; i > 0; i -= 1) {
      const j = page.newSeed() % (i + 1);
      [panes[i], panes[j]] = [panes[j], panes[i]];
    }
    at("panes").replaceChildren(...panes.map((pane) => pane.node));
  }
  panes.forEach((pane, i) => {
    pane.letter = isBlind ? LETTERS[i] : null;
    pane.showBlend();
  });
}

function hideVote() {
  at("vote").hidden = true;
}

function askForVote() {
  const blind = panes.filter((pane) => pane.letter !== null);
  if (!blind.length || blind.some((pane) => pane.isRunning)) return;
  const failed = blind.filter((pane) => pane.turns.at(-1)?.answer?.error);
  if (failed.length) return reveal("A model failed, so there is no vote.");
  const buttons = [...blind, null].map((pane) => {
    const textContent = pane ? pane.letter : "None is better";
    const ariaLabel = pane ? `Answer ${pane.letter} is best` : "None is better";
    const button = element("button", { type: "button", textContent, ariaLabel });
    button.addEventListener("click", () => {
      const letters = blind.map((other) => [other.letter, other]);
      for (const other of blind) other.letter = null;
      vote(blind.map((other) => other.name), pane?.name);
      const names = letters.map(([letter, other]) => `${letter} is ${other.name}`).join(", ");
      reveal(`${names}. ${pane ? `You chose ${pane.name}.` : "You chose none."}`);
    });
    return button;
  });
  at("vote-question").textContent = "Which answer is best? The names are shown after your vote.";
  at("vote-buttons").replaceChildren(...buttons);
  at("vote").hidden = false;
  page.say("All answers are there. Vote for the best one.");
}

function reveal(text) {
  for (const pane of panes) {
    pane.letter = null;
    pane.showBlend();
    pane.render();
  }
  keepAddress();
  at("vote-question").textContent = text;
  at("vote-buttons").replaceChildren();
  at("vote").hidden = false;
  page.say(text);
}

at("blind").addEventListener("change", () => {
  if (!at("blind").checked && panes.some((pane) => pane.letter !== null)) reveal("The blind vote is off.");
});

// --- dialogs -----------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-closes]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
document.querySelector("[data-opens=session-dialog]").addEventListener("click", () => {
  showTally();
  at("session-message").textContent = "";
  at("session-dialog").showModal();
});

function showCode(language) {
  const turns = coded.turns.length;
  if (!turns) coded.turns = [{ user: prompt.value || "Hello", answer: null }];
  const last = coded.turns.at(-1).answer;
  const seed = last?.seed ?? settings.seed ?? 0;
  const request = coded.request(coded.turns.length - 1, settings, seed);
  if (!turns) coded.turns = [];
  const dtype = base()?.details.dtype;
  at("code-note").hidden = !["bfloat16", "float16"].includes(dtype);
  at("code-text").textContent = code(language, request, { base: page.base(), dtype, hasKey: hasKey() });
  for (const tab of document.querySelectorAll("[data-code]")) {
    const isChosen = tab.dataset.code === language;
    tab.hidden = page.kind() !== "text" && tab.dataset.code !== "curl";
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
    if (isChosen) at("code-text").setAttribute("aria-labelledby", tab.id);
  }
}

for (const tab of document.querySelectorAll("[data-code]")) {
  tab.addEventListener("click", () => showCode(tab.dataset.code));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tabs = [...document.querySelectorAll("[data-code]:not([hidden])")];
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    showCode(next.dataset.code);
    next.focus();
  });
}

async function copy(text, button) {
  button.dataset.label ??= button.textContent; // the text may be that of a click before
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "The browser does not allow copying";
  }
  setTimeout(() => {
    button.textContent = button.dataset.label;
  }, 1500);
}
at("copy-code").addEventListener("click", (event) => copy(at("code-text").textContent, event.currentTarget));
at("copy-link").addEventListener("click", (event) => {
  keepAddress();
  copy(location.href, event.currentTarget);
});

/** Show what the server knows now about a pane's model, or about the adapters of its blend. */
async function showCard(pane) {
  at("card-message").textContent = "";
  await readModels().catch((error) => {
    at("card-message").textContent = `These facts may be old. ${error.message}`;
  });
  const names = pane.model === BLEND ? Object.keys(pane.blend) : [pane.model];
  const facts = names.flatMap((name) => {
    const model = models.find(({ id }) => id === name);
    const facts = model ? cardFacts(model) : [["error", "The server does not offer this model."]];
    // The scores are those of the adapter with weight 1.
    const found = pane.model === BLEND ? facts.filter(([name]) => name !== "scores") : facts;
    return names.length > 1 ? [["adapter", name], ...found] : found;
  });
  at("card-title").textContent = pane.name;
  at("card-facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]),
  );
  const reported = models.find(({ id, details }) => names.includes(id) && details.report);
  at("show-report").hidden = !reported;
  at("show-report").onclick = () => showReport(reported.id);
  at("card-dialog").showModal();
}

function cardFacts({ id, details, parent }) {
  const facts = {
    base: parent ?? id,
    method: details.method,
    rank: details.rank,
    alpha: details.alpha,
    size: details.size && shownSize(details.size),
    task: details.task,
    labels: details.labels?.join(", "),
    data: details.data?.join(", "),
    "trained steps": details.step,
    scores: Object.entries(details.scores ?? {}).map(([name, value]) => `${name} ${Number(value.toPrecision(4))}`).join(", "),
    dtype: details.dtype,
    context: details.context && `${details.context.toLocaleString("en")} tokens`,
    engine: details.engine,
    note: details.notice,
    digest: details.digest,
    error: details.error,
  };
  return Object.entries(facts).filter(([, value]) => value !== undefined && value !== null && value !== "");
}

function shownSize(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** Show a report in a frame that runs no scripts. A frame sends no key, so with one the page reads the report itself. */
async function showReport(name) {
  at("card-message").textContent = "";
  const frame = document.createElement("iframe");
  frame.title = `Report of ${name}`;
  frame.setAttribute("sandbox", "");
  try {
    if (hasKey()) frame.srcdoc = withoutAnchors(await readReport(name));
    else frame.src = reportPath(name);
  } catch (error) {
    at("card-message").textContent = error.message;
    return;
  }
  at("report-title").textContent = frame.title;
  at("report-place").replaceChildren(frame);
  at("report-dialog").showModal();
}

at("report-dialog").addEventListener("close", () => at("report-place").replaceChildren());

/** Return a page without links to its own parts: in a frame made of text they would lead out of it. */
function withoutAnchors(html) {
  const page = new DOMParser().parseFromString(html, "text/html");
  for (const link of page.querySelectorAll('a[href^="#"]')) link.removeAttribute("href");
  return page.documentElement.outerHTML;
}

function askForKey() {
  at("key-error").textContent = hasKey() ? "The server does not accept this key." : "";
  if (!at("key-dialog").open) at("key-dialog").showModal();
}
at("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = at("key").value.trim();
  if (!/^[!-~]+$/.test(key)) { // a header cannot send it
    at("key-error").textContent = "A key has ASCII characters only, without spaces. Copy it from the server's keys again.";
    return;
  }
  setKey(key);
  at("key").value = "";
  at("key-dialog").close();
  start();
});

// --- sessions and votes ------------------------------------------------------------------------------

at("export").addEventListener("click", () => {
  const text = exported({
    panes: panes.map(({ choice, threads }) => ({ choice, threads })),
    settings,
    prompt: prompt.value,
    server: { base: page.base(), ...base()?.details },
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `lorakit-session-${new Date().toISOString().slice(0, 16).replaceAll(":", "")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

at("import").addEventListener("change", async () => {
  const [file] = at("import").files;
  at("import").value = "";
  if (!file) return;
  try {
    const found = await imported(file);
    endEdit();
    prompt.value = found.prompt;
    openState(found);
    keepAddress();
    at("session-message").textContent = "The session is open.";
  } catch (error) {
    at("session-message").textContent = error.message;
  }
});

function showTally() {
  const rows = Object.entries(readTally()).sort(([, a], [, b]) => b.won / b.shown - a.won / a.shown);
  const [body] = at("tally").tBodies;
  body.replaceChildren();
  for (const [name, { won, shown }] of rows) {
    const row = body.insertRow();
    row.insertCell().textContent = name;
    for (const count of [won, shown]) {
      const cell = row.insertCell();
      cell.className = "number";
      cell.textContent = count;
    }
  }
  at("tally").hidden = !rows.length;
  at("no-votes").hidden = rows.length > 0;
  at("reset-tally").hidden = !rows.length;
}
at("reset-tally").addEventListener("click", () => {
  forgetTally();
  showTally();
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the part of the address after # is the state of the page
  prompt.focus();
});
watchTokens(at("panes"), at("tip"));
addEventListener("scroll", () => {
  at("tip").hidden = true;
});
// A link that is opened in the page's own tab changes the part of the address after # only.
addEventListener("hashchange", () => {
  if (!started) return start();
  const found = addressed();
  endEdit();
  prompt.value = found.prompt || prompt.value;
  openState(found);
});
// Adapters come and go while the page is in the background.
addEventListener("focus", () => {
  if (started) readModels().catch(() => {});
});
start();
