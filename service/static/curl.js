// The command that answers what the page shows, for a POSIX shell.

/** A word that the shell takes literally. */
function quote(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/** curl itself reads `;` and `,` in a file's name, unless it is in double quotes. */
function upload(name) {
  const plain = /^[\w.-]+$/.test(name);
  return `file=@${plain ? name : `"${name.replace(/["\\]/g, "\\$&")}"`}`;
}

/**
 * @param {string} url where to send it
 * @param {string} file the image's name
 * @param {Object<string, string>} options form fields
 * @param {boolean} withToken whether the service asks for one
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
