/** The way to Prometheus, by the preview's own server. */

/** An answer that is an error, with the query that it is about. */
export class QueryError extends Error {
  constructor(message, query = "") {
    super(message);
    this.query = query;
  }
}

/** JSON of our own server; what is no answer becomes a sentence. */
export async function getJson(address, signal) {
  let answer;
  try {
    answer = await fetch(address, { signal, credentials: "same-origin", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new QueryError("the preview's server does not answer; is `rkmetrics preview` still running?");
  }
  let body;
  try {
    body = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new QueryError(`no JSON came (status ${answer.status})`);
  }
  if (!answer.ok || body.status === "error") throw new QueryError(body.error ?? `status ${answer.status}`);
  return body;
}

/** Queries of one page. What is asked twice in one round goes out once; a new round ends what is still under way. */
export class Client {
  #asked = new Map();
  #controller = new AbortController();

  /** Begin a new round. */
  supersede() {
    this.#controller.abort();
    this.#controller = new AbortController();
    this.#asked.clear();
  }

  /** The `data` of an answer. Raises QueryError, or AbortError once the round is over. */
  get(path, parameters) {
    const address = `${path}?${new URLSearchParams(parameters)}`;
    if (!this.#asked.has(address)) this.#asked.set(address, this.#ask(address));
    return this.#asked.get(address);
  }

  async #ask(address) {
    return (await getJson(address, this.#controller.signal)).data;
  }

  async #evaluate(path, query, parameters) {
    try {
      return (await this.get(path, { query, ...parameters })).result;
    } catch (error) {
      throw error instanceof QueryError ? new QueryError(error.message, query) : error;
    }
  }

  range(query, startMs, endMs, stepMs) {
    const parameters = { start: startMs / 1000, end: endMs / 1000, step: stepMs / 1000 };
    return this.#evaluate("api/v1/query_range", query, parameters);
  }

  instant(query, timeMs) {
    return this.#evaluate("api/v1/query", query, { time: timeMs / 1000 });
  }

  labelValues(label, selector, range) {
    return this.get(`api/v1/label/${encodeURIComponent(label)}/values`, selection(selector, range));
  }

  labelNames(range) {
    return this.get("api/v1/labels", selection("", range));
  }
}

/** Times in whole minutes: variables ask the same in each round of a minute. */
function selection(selector, { from, to }) {
  const parameters = { start: Math.floor(from / 6e4) * 60, end: Math.ceil(to / 6e4) * 60 };
  return selector ? { "match[]": selector, ...parameters } : parameters;
}
