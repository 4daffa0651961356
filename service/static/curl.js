// The curl command with the same answer as the page, for a POSIX shell.

/** Quote a word for the shell. */
function quote(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** Quote a file name for curl, which splits at `;` and `,` outside of double quotes. */
function upload(name) {
  const plain = /^[\w.-]+$/.test(name);
  return `file=@${plain ? name : `"${name.replace(/["\\]/g, "\\$&")}"`}`;
}

/**
 * @param {string} url where to send it
 * @param {string} file the image's name
 * @param {Object<string, string>} options form fields
 * @param {boolean} withToken whether the service needs a token
 */
export function command(url, file, options, withToken) {
  const parts = [`curl -F ${quote(upload(file))}`];
  for (const [name, value] of Object.entries(options)) {
    parts.push(`--form-string ${quote(`${name}=${value}`)}`); // literal, also where it has a ;
  }
  if (withToken) parts.push('-H "Authorization: Bearer $GHM_TOKEN"');
  parts.push(quote(url));
  return parts.join(" \\\n  ");
}
