package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// A demo simulates WeChat, as far as wxscan needs it: the API, the pushes, and
// the phone of whoever one likes to be. It holds to WeChat's rules, so that our
// mistakes show.
type demo struct {
	*http.ServeMux
	config config
	says   func(ticket string) (text string, ok bool) // what a camera reads off a ticket's QR code
	client *http.Client                               // for pushes and callbacks

	mu     sync.Mutex    // guards the fields below
	grants memory[grant] // by what was issued
	stable string        // the last stable access token
	plain  string        // the last plain one
}

// A grant is something that the simulator has issued, and remembers.
type grant struct {
	kind    string // "token", "qr" (by the id in its URL), "ticket", "code" or "user", a user's own token
	expires time.Time
	of      string // qr: ticket; ticket: URL; code, user: openid
	scope   string // qr: scene; code, user: scope
	virtual bool   // code: of a snapshot page's user
	used    bool   // code
}

const (
	maxGrants   = 300_000         // bounds the memory of a simulator that strangers can reach
	pushTimeout = 5 * time.Second // WeChat's patience with us
)

// newDemo returns the simulator of the account that config is of.
func newDemo(config config, client *http.Client, says func(string) (string, bool)) *demo {
	d := &demo{config: config, says: says, client: client, grants: newMemory[grant](maxGrants), ServeMux: http.NewServeMux()}
	api := func(pattern string, h func(*http.Request) (object, *apiError)) {
		d.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			d.mu.Lock()
			defer d.mu.Unlock()
			v, refused := h(r)
			if refused != nil {
				v = object{"errcode": refused.code, "errmsg": refused.message + " rid: 674a2f31-0c81d5b4-3e9d17a6"}
			}
			w.Header().Set("Content-Type", "text/plain") // as WeChat does
			json.NewEncoder(w).Encode(v)
		})
	}
	api("POST /demo/cgi-bin/stable_token", d.stableTokenLocked)
	api("GET /demo/cgi-bin/token", d.plainTokenLocked)
	api("POST /demo/cgi-bin/qrcode/create", d.createQRLocked)
	api("GET /demo/sns/oauth2/access_token", d.exchangeCodeLocked)
	api("GET /demo/sns/userinfo", d.userInfoLocked)
	d.HandleFunc("GET /demo/cgi-bin/showqrcode", d.showQR)
	d.HandleFunc("GET /demo/avatar.svg", d.avatar)
	d.HandleFunc("/demo/q/{id}", d.phone)
	d.HandleFunc("/demo/connect/oauth2/authorize", d.phone)
	d.HandleFunc("POST /demo/scan", d.scan)
	return d
}

// issueLocked remembers a grant for the given time, and returns its name.
func (d *demo) issueLocked(name string, life time.Duration, g grant) string {
	g.expires = time.Now().Add(life)
	d.grants.put(name, g, life+10*time.Minute) // so that expired can be told from unknown
	return name
}

// granted returns a grant, which may have expired; without one its kind is "".
func (d *demo) granted(name string) grant {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.grantedLocked(name)
}

func (d *demo) grantedLocked(name string) grant {
	g, _ := d.grants.get(name)
	return g
}

func refuse(code int, message string) (object, *apiError) {
	return nil, &apiError{code: code, message: message}
}

func (d *demo) newTokenLocked() string {
	return d.issueLocked("85_"+rand.Text()+strings.Repeat("-"+rand.Text(), 5), 2*time.Hour, grant{kind: "token"})
}

// stableTokenLocked gives the same token until 5 minutes before its end.
func (d *demo) stableTokenLocked(r *http.Request) (object, *apiError) {
	var ask struct {
		GrantType    string `json:"grant_type"`
		AppID        string `json:"appid"`
		Secret       string `json:"secret"`
		ForceRefresh bool   `json:"force_refresh"`
	}
	if json.NewDecoder(r.Body).Decode(&ask) != nil || ask.GrantType != "client_credential" {
		return refuse(47001, "data format error")
	}
	if refused := d.stranger(ask.AppID, ask.Secret); refused != nil {
		return nil, refused
	}
	if ask.ForceRefresh || time.Until(d.grantedLocked(d.stable).expires) < 5*time.Minute {
		d.stable = d.newTokenLocked()
	}
	return object{"access_token": d.stable, "expires_in": int(time.Until(d.grantedLocked(d.stable).expires).Seconds())}, nil
}

// plainTokenLocked gives a new token, and the former one 5 minutes to live.
func (d *demo) plainTokenLocked(r *http.Request) (object, *apiError) {
	if refused := d.stranger(r.FormValue("appid"), r.FormValue("secret")); refused != nil {
		return nil, refused
	}
	if former := d.grantedLocked(d.plain); time.Until(former.expires) > 5*time.Minute {
		d.issueLocked(d.plain, 5*time.Minute, former)
	}
	d.plain = d.newTokenLocked()
	return object{"access_token": d.plain, "expires_in": 7200}, nil
}

// stranger refuses an appid or a secret that are not those of the account.
func (d *demo) stranger(appID, secret string) *apiError {
	switch {
	case appID != d.config.appID:
		return &apiError{code: 40013, message: "invalid appid"}
	case secret != d.config.appSecret:
		return &apiError{code: 40125, message: "invalid appsecret"}
	}
	return nil
}

func (d *demo) createQRLocked(r *http.Request) (object, *apiError) {
	var ask struct {
		ExpireSeconds int    `json:"expire_seconds"`
		ActionName    string `json:"action_name"`
		ActionInfo    struct {
			Scene struct {
				SceneStr string `json:"scene_str"`
			} `json:"scene"`
		} `json:"action_info"`
	}
	token := d.grantedLocked(r.URL.Query().Get("access_token"))
	err := json.NewDecoder(r.Body).Decode(&ask)
	scene := ask.ActionInfo.Scene.SceneStr
	length := utf8.RuneCountInString(scene)
	switch {
	case token.kind != "token":
		return refuse(40001, "invalid credential, access_token is invalid or not latest")
	case time.Now().After(token.expires):
		return refuse(42001, "access_token expired")
	case err != nil:
		return refuse(47001, "data format error")
	case ask.ActionName != "QR_STR_SCENE", length < 1, length > 64, ask.ExpireSeconds < 1, ask.ExpireSeconds > 2592000:
		return refuse(40097, "invalid args")
	}
	random := make([]byte, 64)
	rand.Read(random)
	ticket, life := "gQH/+"+base64.StdEncoding.EncodeToString(random), time.Duration(ask.ExpireSeconds)*time.Second
	link := d.config.publicURL + "/demo/q/" + d.issueLocked(rand.Text(), life, grant{kind: "qr", of: ticket, scope: scene})
	d.issueLocked(ticket, life, grant{kind: "ticket", of: link})
	return object{"ticket": ticket, "expire_seconds": ask.ExpireSeconds, "url": link}, nil
}

func (d *demo) exchangeCodeLocked(r *http.Request) (object, *apiError) {
	if refused := d.stranger(r.FormValue("appid"), r.FormValue("secret")); refused != nil {
		return nil, refused
	}
	code := d.grantedLocked(r.FormValue("code"))
	switch {
	case code.kind != "code":
		return refuse(40029, "invalid code")
	case code.used:
		return refuse(40163, "code been used")
	case time.Now().After(code.expires):
		return refuse(42003, "oauth_code expired")
	}
	code.used = true
	d.grants.put(r.FormValue("code"), code, 10*time.Minute)
	token := d.issueLocked(rand.Text(), 2*time.Hour, grant{kind: "user", of: code.of, scope: code.scope})
	v := object{"access_token": token, "expires_in": 7200, "refresh_token": rand.Text(), "openid": code.of, "scope": code.scope}
	if code.virtual {
		v["is_snapshotuser"] = 1
	}
	return v, nil
}

func (d *demo) userInfoLocked(r *http.Request) (object, *apiError) {
	user := d.grantedLocked(r.FormValue("access_token"))
	switch {
	case user.kind != "user", time.Now().After(user.expires):
		return refuse(40001, "invalid credential")
	case user.of != r.FormValue("openid"):
		return refuse(40003, "invalid openid")
	case user.scope != "snsapi_userinfo":
		return refuse(48001, "api unauthorized")
	}
	return object{"openid": user.of, "nickname": user.of, "sex": 0, "province": "", "city": "", "country": "",
		"headimgurl": d.config.publicURL + "/demo/avatar.svg", "privilege": []string{}, "unionid": "union-" + user.of}, nil
}

func (d *demo) avatar(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "image/svg+xml")
	io.WriteString(w, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path fill="#07c160" d="M0 0h8v8H0z"/>`+
		`<g fill="#fff"><circle cx="4" cy="3" r="1.5"/><path d="M1 8a3 3 0 0 1 6 0z"/></g></svg>`)
}

func (d *demo) showQR(w http.ResponseWriter, r *http.Request) {
	ticket := d.granted(r.FormValue("ticket"))
	picture, err := qrPNG(ticket.of)
	if ticket.kind != "ticket" || err != nil {
		http.NotFound(w, r)
		return
	}
	write(w, http.StatusOK, "image/png", picture) // with WeChat, a JPEG
}

// phone is the phone that has opened what a QR code says.
func (d *demo) phone(w http.ResponseWriter, r *http.Request) {
	shown, back, err := d.act(r.Context(), d.config.publicURL+r.URL.RequestURI(), r.PostFormValue("openid"), r.PostFormValue("event"))
	status, asks := http.StatusOK, ""
	switch {
	case err != nil:
		status, shown = http.StatusBadRequest, err.Error()
	case back != "":
		http.Redirect(w, r, back, http.StatusSeeOther)
		return
	case shown == "" && r.PathValue("id") != "":
		asks = "scan"
	case shown == "":
		asks = "auth"
	}
	_, link, _ := strings.Cut(shown, `<a href="`)
	link, _, _ = strings.Cut(link, `"`)
	writePage(w, status, "static/demo/phone.html", "Shown", shown, "Link", link, "Asks", asks)
}

// scan is the phone for curl: it scans the QR code of a live ticket of either
// flow, as openid. event is that of a button on the phone's page.
func (d *demo) scan(w http.ResponseWriter, r *http.Request) {
	says, ok := d.says(r.FormValue("ticket"))
	if !ok {
		http.Error(w, "no such ticket, or it has expired", http.StatusNotFound)
		return
	}
	link := strings.TrimSuffix(says, "#wechat_redirect")
	event := map[bool]string{true: "allow", false: "scan"}[link != says]
	shown, back, err := d.act(r.Context(), link, r.FormValue("openid"), cmp.Or(r.FormValue("event"), event))
	if back != "" {
		var resp *http.Response
		if resp, _, err = d.send(r.Context(), http.MethodGet, strings.TrimPrefix(back, d.config.publicURL), nil); err == nil {
			shown = resp.Header.Get("Location")
		}
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	write(w, http.StatusOK, plainText, []byte(shown+"\n"))
}

// authorizePage is the authorize page's link: these parameters, in this order.
var authorizePage = regexp.MustCompile(`^/connect/oauth2/authorize\?appid=([^&]+)&redirect_uri=([^&]+)&response_type=code&scope=(snsapi_base|snsapi_userinfo)&state=([0-9A-Za-z]{0,128})$`)

// act does what WeChat does when somebody has opened a link of either flow and
// pressed a button; "" only looks. It returns what the phone shows, or the
// callback that it goes back to.
func (d *demo) act(ctx context.Context, link, openID, event string) (shown, back string, err error) {
	path := strings.TrimPrefix(link, d.config.publicURL+"/demo")
	auth := authorizePage.FindStringSubmatch(path)
	id, isQR := strings.CutPrefix(path, "/q/")
	qr := d.granted(id)
	switch {
	case isQR && (qr.kind != "qr" || time.Now().After(qr.expires)):
		return "", "", errors.New("二维码已过期 This QR code has expired")
	case !isQR && auth == nil:
		return "", "", errors.New("空白页 A blank page: parameters missing, malformed or in the wrong order")
	case !isQR && auth[1] != d.config.appID:
		return "", "", errors.New("10003 appid 错误")
	case !isQR && !strings.HasPrefix(auth[2], url.QueryEscape(d.config.publicURL+"/")):
		return "", "", errors.New("10003 redirect_uri 域名与后台配置不一致")
	case event == "":
		return "", "", nil
	case openID == "" || len(openID) > 64:
		return "", "", errors.New("openid: 1 to 64 bytes")
	case isQR && event == "scan":
		shown, err = d.push(ctx, openID, "SCAN", qr.scope, qr.of)
		return shown, "", err
	case isQR && event == "subscribe":
		shown, err = d.push(ctx, openID, "subscribe", "qrscene_"+qr.scope, qr.of)
		return shown, "", err
	case isQR:
		return "没有关注，什么也没有发送。 Not followed; nothing was sent.", "", nil
	}
	code := "authdeny"
	if event != "decline" {
		d.mu.Lock()
		defer d.mu.Unlock()
		code = d.issueLocked(rand.Text(), 5*time.Minute, grant{kind: "code", of: openID, scope: auth[3], virtual: event == "snapshot"})
	}
	redirect, err := url.QueryUnescape(auth[2])
	return "", redirect + "?code=" + code + "&state=" + auth[4], err
}

// signedQuery returns a fresh query of WeChat's, signed.
func (c *config) signedQuery() url.Values {
	timestamp, nonce := strconv.FormatInt(time.Now().Unix(), 10), rand.Text()
	return url.Values{"signature": {signature(c.token, timestamp, nonce)}, "timestamp": {timestamp}, "nonce": {nonce}}
}

// signedPush returns an event as WeChat pushes it: its query and its body,
// signed, and sealed if there is a key.
func (c *config) signedPush(openID, event, eventKey, ticket string) (url.Values, []byte, error) {
	message, err := xml.Marshal(struct {
		XMLName                          xml.Name `xml:"xml"`
		ToUserName, FromUserName         cdata
		CreateTime                       int64
		MsgType, Event, EventKey, Ticket cdata
	}{
		ToUserName: cdata{"gh_0123456789ab"}, FromUserName: cdata{openID}, CreateTime: time.Now().Unix(),
		MsgType: cdata{"event"}, Event: cdata{event}, EventKey: cdata{eventKey}, Ticket: cdata{ticket},
	})
	query := c.signedQuery()
	if c.aesKey != nil {
		encrypt := c.aesKey.seal([]byte(rand.Text()[:16]), message, c.appID)
		query.Set("encrypt_type", "aes")
		query.Set("msg_signature", signature(c.token, query.Get("timestamp"), query.Get("nonce"), encrypt))
		message = fmt.Appendf(nil, "<xml><ToUserName>gh_0123456789ab</ToUserName><Encrypt>%s</Encrypt></xml>", encrypt)
	}
	return query, message, err
}

// push sends an event to the account's server, three times if it is not
// answered. It returns what the user sees.
func (d *demo) push(ctx context.Context, openID, event, eventKey, ticket string) (string, error) {
	query, message, err := d.config.signedPush(openID, event, eventKey, ticket)
	key := d.config.aesKey
	var status int
	var body []byte
	for try := 1; try <= 3 && err == nil && status == 0; try++ {
		if resp, answer, _ := d.send(ctx, http.MethodPost, "/wechat/message?"+query.Encode(), message); resp != nil {
			status, body = resp.StatusCode, answer
		}
	}
	var reply struct {
		XMLName                                          xml.Name `xml:"xml"`
		Content, Encrypt, MsgSignature, TimeStamp, Nonce string
	}
	switch {
	case status == http.StatusOK && (len(body) == 0 || string(body) == "success"):
		return "（没有回复 no reply）", nil
	case status != http.StatusOK, decodeXML(body, &reply) != nil:
		return "", fmt.Errorf("该公众号提供的服务出现故障，请稍后再试 (status %d)", status)
	case key == nil:
		return reply.Content, nil
	case !verify(reply.MsgSignature, d.config.token, reply.TimeStamp, reply.Nonce, reply.Encrypt):
		return "", errSignature
	}
	if body, err = key.open(reply.Encrypt, d.config.appID); err == nil {
		err = decodeXML(body, &reply)
	}
	return reply.Content, err
}

// send makes a request of the program itself, over loopback.
func (d *demo) send(ctx context.Context, method, path string, body []byte) (*http.Response, []byte, error) {
	return sendAsWeChat(ctx, d.client, method, strings.TrimSuffix(d.config.apiBase, "/demo")+path, body)
}

// sendAsWeChat makes a request as WeChat does: with 5 seconds of patience, and
// with a User-Agent by which some tunnels take it for a browser. The error is
// free of the URL.
func sendAsWeChat(ctx context.Context, client *http.Client, method, target string, body []byte) (*http.Response, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, pushTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return nil, nil, withoutURL(err)
	}
	req.Header.Set("User-Agent", "Mozilla/4.0")
	resp, err := client.Do(req)
	if err != nil {
		return nil, nil, withoutURL(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	return resp, answer, err
}
