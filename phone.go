package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/xml"
	"errors"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// phone is the phone that has opened the link of a QR code.
func (d *demo) phone(w http.ResponseWriter, r *http.Request) {
	link := d.config.publicURL + r.URL.RequestURI()
	shown, err := d.act(r.Context(), link, r.PostFormValue("openid"), r.PostFormValue("event"))
	status, asks := http.StatusOK, ""
	switch isQR := r.PathValue("id") != ""; {
	case err != nil:
		status, shown = http.StatusBadRequest, err.Error()
	case shown == "" && isQR:
		asks = "scan"
	case shown == "":
		asks = "auth"
	case !isQR:
		http.Redirect(w, r, shown, http.StatusSeeOther)
		return
	}
	d.config.writePage(w, status, "static/demo/phone.html",
		"Site", d.config.site(), "Asks", asks, "Reply", bubble(shown))
}

// chatLink matches a link of a message, after HTML escaping.
var chatLink = regexp.MustCompile(`&lt;a href=&#34;(https?://(?:[^&]|&amp;)+)&#34;&gt;([^&]*)&lt;/a&gt;`)

// bubble returns a message as a chat shows it: links are links, the rest is text.
func bubble(message string) markup {
	return markup(chatLink.ReplaceAllString(html.EscapeString(message), `<a href="$1">$2</a>`))
}

// showAccount shows the account's own QR code, which leads to the chat with it.
func (d *demo) showAccount(w http.ResponseWriter, r *http.Request) {
	picture, err := qrPNG(d.config.publicURL + "/demo/chat")
	if r.FormValue("username") != d.config.account || err != nil {
		http.NotFound(w, r)
		return
	}
	write(w, http.StatusOK, "image/png", picture) // with WeChat, a JPEG
}

// chat is the phone that has opened the chat with the account. With the event
// subscribe it follows the account, else it sends content, if there is any.
func (d *demo) chat(w http.ResponseWriter, r *http.Request) {
	openID, content, event := r.PostFormValue("openid"), r.PostFormValue("content"), r.PostFormValue("event")
	status, shown := http.StatusOK, ""
	var err error
	switch {
	case content == "" && event == "":
	case event == "subscribe":
		shown, err = d.push(r.Context(), openID, "subscribe", "", "")
	default:
		shown, err = d.sendText(r.Context(), openID, content)
	}
	if err != nil {
		status, shown = http.StatusBadRequest, err.Error()
	}
	d.config.writePage(w, status, "static/demo/phone.html",
		"Site", d.config.site(), "Asks", "code", "Reply", bubble(shown))
}

// scan is the phone for curl: it scans the QR code of a live ticket, or sends its
// digits, as openid. event is that of a button on the phone's page.
func (d *demo) scan(w http.ResponseWriter, r *http.Request) {
	ticket, err := d.tickets.look(r.Context(), digest(r.FormValue("ticket")))
	if err != nil || ticket.Status == statusExpired {
		http.Error(w, "no such ticket, or it has expired", http.StatusNotFound)
		return
	}
	link := ticket.QR
	if ticket.Flow == flowAuth {
		link = newWeChat(&d.config, nil).loginURL(d.config.publicURL, digest(r.FormValue("ticket")))
	}
	link, isAuth := strings.CutSuffix(link, "#wechat_redirect")
	event, shown := "scan", ""
	if isAuth {
		event = "allow"
	}
	if ticket.Flow == flowCode {
		shown, err = d.sendText(r.Context(), r.FormValue("openid"), ticket.QR)
	} else {
		shown, err = d.act(r.Context(), link, r.FormValue("openid"), cmp.Or(r.FormValue("event"), event))
	}
	if isAuth && err == nil {
		var resp *http.Response
		back := d.server + strings.TrimPrefix(shown, d.config.publicURL)
		if resp, _, err = sendAsWeChat(r.Context(), d.client, http.MethodGet, back, nil); err == nil {
			shown = resp.Header.Get("Location")
		}
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	write(w, http.StatusOK, plainText, []byte(shown+"\n"))
}

// authorizePage matches the link of the authorize page: these parameters, in this order.
var authorizePage = regexp.MustCompile(`^/connect/oauth2/authorize\?appid=([^&]+)&redirect_uri=([^&]+)` +
	`&response_type=code&scope=(snsapi_base|snsapi_userinfo)&state=([0-9A-Za-z]{0,128})$`)

// act does what WeChat does when somebody opens a link of either flow and presses the
// button event; with "" they only look. It returns what the phone shows or, in flow
// B, the callback that it goes to.
func (d *demo) act(ctx context.Context, link, openID, event string) (string, error) {
	path := strings.TrimPrefix(link, d.config.publicURL+"/demo")
	auth := authorizePage.FindStringSubmatch(path)
	id, isQR := strings.CutPrefix(path, "/q/")
	qr := d.granted(id)
	switch {
	case isQR && (qr.kind != "qr" || time.Now().After(qr.expires)):
		return "", errors.New("二维码已过期 This QR code has expired")
	case !isQR && auth == nil:
		return "", errors.New("空白页 A blank page: parameters missing, malformed or in the wrong order")
	case !isQR && auth[1] != d.config.appID:
		return "", errors.New("10003 appid 错误")
	case !isQR && !strings.HasPrefix(auth[2], url.QueryEscape(d.config.publicURL+"/")):
		return "", errors.New("10003 redirect_uri 域名与后台配置不一致")
	case event == "":
		return "", nil
	case openID == "" || len(openID) > 64:
		return "", errOpenID
	case isQR && event == "scan":
		return d.push(ctx, openID, "SCAN", qr.scope, qr.of)
	case isQR && event == "subscribe":
		return d.push(ctx, openID, "subscribe", "qrscene_"+qr.scope, qr.of)
	case isQR:
		return "没有关注，什么也没有发送。 Not followed; nothing was sent.", nil
	}
	code := "authdeny"
	if event != "decline" {
		code = d.issue(rand.Text(), 5*time.Minute,
			grant{kind: "code", of: openID, scope: auth[3], virtual: event == "snapshot"})
	}
	redirect, err := url.QueryUnescape(auth[2])
	return redirect + "?code=" + code + "&state=" + auth[4], err
}

// push sends an event to the account's server. It returns what the user sees.
func (d *demo) push(ctx context.Context, openID, event, eventKey, ticket string) (string, error) {
	query, message, err := d.config.signedPush(openID, event, eventKey, ticket)
	if err != nil {
		return "", err
	}
	return d.deliver(ctx, query, message)
}

// sendText sends a text message to the account's server. It returns what the user sees.
func (d *demo) sendText(ctx context.Context, openID, content string) (string, error) {
	if openID == "" || len(openID) > 64 {
		return "", errOpenID
	}
	query, message, err := d.config.signedText(openID, content)
	if err != nil {
		return "", err
	}
	return d.deliver(ctx, query, message)
}

// deliver sends a push to the account's server, three times if it is not answered.
// It returns what the user sees.
func (d *demo) deliver(ctx context.Context, query url.Values, message []byte) (string, error) {
	target, status, body := d.server+"/wechat/message?"+query.Encode(), 0, []byte(nil)
	for try := 1; try <= 3 && status == 0; try++ {
		if resp, answer, _ := sendAsWeChat(ctx, d.client, http.MethodPost, target, message); resp != nil {
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
	case d.config.aesKey == nil:
		return reply.Content, nil
	case !verify(reply.MsgSignature, d.config.token, reply.TimeStamp, reply.Nonce, reply.Encrypt):
		return "", errSignature
	}
	body, err := d.config.aesKey.open(reply.Encrypt, d.config.appID)
	if err == nil {
		err = decodeXML(body, &reply)
	}
	return reply.Content, err
}
