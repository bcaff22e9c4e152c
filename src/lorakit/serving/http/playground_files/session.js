// What outlives an answer: the address of the page, sessions as JSON, and the tally of blind votes.

const FORMAT = "lorakit-playground";
const VERSION = 2; // 1 had the turns of one kind of prompt, and votes
const TALLY = "lorakit-votes";
export const MOST_PANES = 4;
const LARGEST_FILE = 20_000_000;

const NUMBERS = { temperature: [0, 2], top_p: [0.01, 1], top_k: [0, 1e6], max_tokens: [1, 1e6] };

/** Return the panes, settings and prompt of the page as the part of its address after #. */
export function toHash({ panes, settings, prompt }) {
  const query = new URLSearchParams();
  for (const choice of panes) {
    if (choice.blend) query.append("blend", JSON.stringify(choice.blend));
    else query.append("model", choice.model);
  }
  query.set("mode", settings.mode);
  for (const name of Object.keys(NUMBERS)) query.set(name, settings[name]);
  if (settings.seed !== null) query.set("seed", settings.seed);
  if (settings.stop) query.set("stop", settings.stop);
  if (settings.system) query.set("system", settings.system);
  if (prompt) query.set("prompt", prompt);
  return `#${query}`;
}

/** Return what an address says, without what is missing or wrong. */
export function fromHash(hash) {
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  const panes = [];
  for (const [name, value] of query) {
    if (name === "model") panes.push({ model: value });
    if (name === "blend") panes.push({ blend: parsed(value) });
  }
  const raw = Object.fromEntries(query);
  for (const name of [...Object.keys(NUMBERS), "seed"]) if (name in raw) raw[name] = Number(raw[name]);
  return { panes: panes.filter(isChoice).slice(0, MOST_PANES), settings: checkedSettings(raw), prompt: raw.prompt ?? "" };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function isRecord(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isChoice(value) {
  if (!isRecord(value)) return false;
  if (typeof value.model === "string") return value.model !== "" && !("blend" in value);
  const weights = isRecord(value.blend) ? Object.values(value.blend) : [];
  return weights.length > 0 && weights.length <= 8 && weights.every((weight) => Number.isFinite(weight) && Math.abs(weight) <= 100);
}

function checkedSettings(raw) {
  const found = {};
  for (const [name, [least, most]] of Object.entries(NUMBERS)) {
    if (Number.isFinite(raw[name])) found[name] = Math.min(Math.max(raw[name], least), most);
  }
  if (Number.isSafeInteger(raw.seed)) found.seed = raw.seed;
  if (["chat", "text"].includes(raw.mode)) found.mode = raw.mode;
  for (const name of ["stop", "system"]) if (typeof raw[name] === "string") found[name] = raw[name];
  return found;
}

/** Return a session as text. */
export function exported({ panes, settings, prompt, server }) {
  const content = { format: FORMAT, version: VERSION, server, settings, prompt, panes };
  return JSON.stringify(content, null, 2);
}

/** Return the session in a file. Throws an Error that says what is wrong. */
export async function imported(file) {
  if (file.size > LARGEST_FILE) throw new Error("The file is larger than 20 MB; it is not a session of this page.");
  const content = parsed(await file.text());
  if (!isRecord(content) || content.format !== FORMAT) throw new Error("The file is not a session of this page.");
  if (![1, VERSION].includes(content.version)) {
    throw new Error(`The session has version ${content.version}; this page reads 1 to ${VERSION}.`);
  }
  const panes = Array.isArray(content.panes) ? content.panes.filter((pane) => isChoice(pane?.choice)) : [];
  if (!panes.length) throw new Error("The session has no panes.");
  const settings = checkedSettings(isRecord(content.settings) ? content.settings : {});
  return {
    settings,
    prompt: text(content.prompt),
    panes: panes.slice(0, MOST_PANES).map(({ choice, turns, threads }) => {
      const found = content.version === 1 ? { [settings.mode ?? "chat"]: turns } : threads;
      return { choice, threads: { chat: checkedTurns(found?.chat), text: checkedTurns(found?.text) } };
    }),
  };
}

function checkedTurns(turns) {
  return (Array.isArray(turns) ? turns : []).filter((turn) => typeof turn?.user === "string").map(checkedTurn);
}

function checkedTurn({ user, answer }) {
  if (!isRecord(answer)) return { user, answer: null };
  const { tokens, figures } = answer;
  const isToken = (token) => typeof token?.text === "string" && Number.isFinite(token.logprob);
  return {
    user,
    answer: {
      text: text(answer.text),
      tokens: Array.isArray(tokens) && tokens.every(isToken) ? tokens : [],
      seed: Number.isSafeInteger(answer.seed) ? answer.seed : 0,
      most: Number.isSafeInteger(answer.most) ? answer.most : 0,
      fingerprint: text(answer.fingerprint),
      figures: isRecord(figures) && Object.values(figures).every(Number.isFinite) ? figures : null,
      error: typeof answer.error === "string" ? answer.error : null,
      scores: isRecord(answer.scores) && Object.values(answer.scores).every(Number.isFinite) ? answer.scores : null,
      ended: text(answer.ended),
    },
  };
}

function text(value) {
  return typeof value === "string" ? value : "";
}

/** Return the votes by model, {won, shown}. */
export function readTally() {
  const found = parsed(localStorage.getItem(TALLY) ?? "{}");
  return isRecord(found) ? found : {};
}

/** Record a vote among models for one of them, or for none. */
export function vote(models, winner) {
  const tally = readTally();
  for (const model of new Set(models)) {
    const { won = 0, shown = 0 } = tally[model] ?? {};
    tally[model] = { won: won + (model === winner ? 1 : 0), shown: shown + 1 };
  }
  localStorage.setItem(TALLY, JSON.stringify(tally));
}

export function forgetTally() {
  localStorage.removeItem(TALLY);
}
