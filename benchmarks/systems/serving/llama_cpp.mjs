// Serves requests with llama.cpp, as JSON lines: stdin {"id", "prompt", "adapter", "tokens"} or {"load": [paths], "sequences", "batchSize"} or
// {"cancel": true},
// stdout {"id", "token"}, {"id", "end", "error"?} and {"ready": true}. Usage: node llama_cpp.mjs OPTIONS-AS-JSON
//
// llama.cpp applies an adapter to a whole context, so each adapter has a context of its own, with several sequences
// that it batches. The contexts share the weights of the base.
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const options = JSON.parse(process.argv[2]);
const {getLlama} = await import(pathToFileURL(options.module).href);

const say = (value) => process.stdout.write(JSON.stringify(value) + "\n");
// "never": use the packaged binary or fail; do not download or compile one.
const llama = await getLlama({gpu: false, logLevel: "error", build: "never", maxThreads: options.threads, skipDownload: true});
const model = await llama.loadModel({modelPath: options.model, gpuLayers: 0});

const contexts = new Map();
let cancelled = 0; // all requests up to this number
let newest = 0;
let size = {sequences: options.sequences, batchSize: options.batchSize};
async function contextOf(adapter) {
    if (!contexts.has(adapter))
        contexts.set(adapter, (async () => {
            const context = await model.createContext({
                ...size,
                contextSize: options.contextSize,
                threads: options.threads,
                flashAttention: "auto",
                ignoreMemorySafetyChecks: true,
                lora: adapter == null ? undefined : {adapters: [{filePath: adapter}]}
            });
            const free = Array.from({length: size.sequences}, () => context.getSequence());
            return {context, free, waiting: []};
        })());
    return await contexts.get(adapter);
}

async function acquire(context) {
    if (context.free.length > 0)
        return context.free.pop();
    return await new Promise((resolve) => context.waiting.push(resolve));
}

function release(context, sequence) {
    const next = context.waiting.shift();
    if (next != null)
        next(sequence);
    else
        context.free.push(sequence);
}

async function answer({id, prompt, adapter, tokens}) {
    try {
        const context = await contextOf(adapter ?? null);
        const sequence = await acquire(context);
        try {
            if (id <= cancelled)
                throw new Error("cancelled");
            await sequence.clearHistory();
            let count = 0;
            for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
                say({id, token});
                count++;
                if (count === tokens || id <= cancelled)
                    break;
            }
            say({id, end: true});
        } finally {
            release(context, sequence);
        }
    } catch (error) {
        say({id, end: true, error: String(error?.message ?? error).slice(0, 200)});
    }
}

say({ready: true});
for await (const line of readline.createInterface({input: process.stdin})) {
    const message = JSON.parse(line);
    if (message.load != null) {
        try {
            for (const [adapter, opened] of contexts) {
                contexts.delete(adapter);
                await (await opened).context.dispose();
            }
            size = {sequences: message.sequences, batchSize: message.batchSize};
            for (const adapter of message.load.length > 0 ? message.load : [null])
                await contextOf(adapter);
            say({ready: true});
        } catch (error) {
            say({ready: false, error: String(error?.message ?? error).slice(0, 200)});
        }
    } else if (message.cancel)
        cancelled = newest;
    else {
        newest = message.id;
        void answer(message);
    }
}
process.exit(0);
